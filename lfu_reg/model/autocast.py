"""torch.autocast: its state, noted down or set aside, and whether it brings float16 into play."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Autocast:
    """The autocast state of one device type."""

    device_type: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def current(cls, device_type: str) -> Autocast:
        """The state here and now."""
        return cls(device_type, torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type))


def autocast_in_force(devices: Iterable[torch.device]) -> tuple[Autocast, ...]:
    """The states of the CPU and of some devices' types, to be entered again later."""
    return tuple(Autocast.current(t) for t in dict.fromkeys(["cpu", *(device.type for device in devices)]))


@contextmanager
def entered_again(states: Iterable[Autocast]) -> Iterator[None]:
    """The autocast that was in force where `states` were noted down."""
    with ExitStack() as surroundings:
        for state in states:
            surroundings.enter_context(torch.autocast(state.device_type, dtype=state.dtype, enabled=state.enabled))
        yield


@contextmanager
def no_autocast() -> Iterator[None]:
    """No autocast for any device in the block.

    The step takes its gradients inside of the caller's `with autocast():`, where a plain loop backpropagates outside
    of it. Operations of the backward would be cast anew there, also those of parts that ran in full precision.
    """
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
