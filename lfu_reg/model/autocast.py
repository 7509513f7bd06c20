"""torch.autocast: set aside, and whether it brings float16 into play."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor


@contextmanager
def no_autocast() -> Iterator[None]:
    """No autocast for any device in the block."""
    # The step backpropagates inside of the caller's `with autocast():`, where a plain loop does so outside of it: the
    # backward of parts that ran in full precision would be cast, too.
    types = ["cpu", "cuda"]
    if torch.accelerator.is_available() and (device := torch.accelerator.current_accelerator()) is not None:
        types.append(device.type)
    with ExitStack() as off:
        for device_type in dict.fromkeys(types):
            off.enter_context(without_autocast(device_type))
        yield


def in_float16(tensor: Tensor) -> bool:
    """Whether a tensor is float16, or an operation on it would be under autocast."""
    device = tensor.device.type
    return tensor.dtype is torch.float16 or (
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is torch.float16
    )


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Context in which operations run in the dtype of their arguments."""
    # Components are cast to the activation's dtype: under autocast a layer would return another one than it did.
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
