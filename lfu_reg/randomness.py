"""Random number state: pass 2 repeats pass 1's draws, and the caller's stream goes on as if only SFT had run.

Without the replay the consistency term would measure dropout noise. Python's and numpy's generators are kept as well:
layerdrop and feature masking in some models draw from them.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """A snapshot of every global generator that a forward pass may draw from."""

    cpu: Tensor
    devices: tuple[tuple[torch.device, Tensor], ...]
    python: Any
    numpy: Any

    @classmethod
    def capture(cls, devices: Iterable[torch.device] = ()) -> RandomState:
        """The state now; `devices` are the accelerators in use (the CPU's is always included)."""
        numpy = sys.modules.get("numpy")
        return cls(
            cpu=torch.get_rng_state(),
            devices=tuple(
                (device, torch.get_device_module(device).get_rng_state(device))
                for device in devices
                if device.type not in ("cpu", "meta")
            ),
            python=random.getstate(),
            numpy=numpy.random.get_state() if numpy is not None else None,
        )

    def restore(self) -> None:
        """Put every generator back to this state."""
        torch.set_rng_state(self.cpu)
        for device, state in self.devices:
            torch.get_device_module(device).set_rng_state(state, device)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)
