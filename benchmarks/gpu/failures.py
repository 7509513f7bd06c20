"""Parts that fail, each in its own way, for the rehearsal."""

from __future__ import annotations

import os
import signal
import time
from typing import Any
from unittest import mock

from gpu.place import Place, Skipped


def raises(place: Place) -> dict[str, Any]:
    raise RuntimeError("a mistake")


def runs_out_of_memory(place: Place) -> dict[str, Any]:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 EiB.")


def has_nothing_to_do(place: Place) -> dict[str, Any]:
    raise Skipped("nothing to do")


def hangs(place: Place) -> dict[str, Any]:
    while True:
        time.sleep(60)


def is_killed(place: Place) -> dict[str, Any]:
    """As the system does to a process that takes too much memory."""
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def loses_the_device(place: Place) -> dict[str, Any]:
    """As after an illegal access: every later call would fail as well."""
    mock.patch.object(type(place.device), "is_alive", return_value=False).start()
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def goes_on(place: Place) -> dict[str, Any]:
    return {"alive": place.device.is_alive()}
