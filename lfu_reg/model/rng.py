"""Random numbers: pass 2 repeats pass 1's draws, and the caller's stream goes on as if only SFT had run.

Without that the consistency term would measure dropout noise. Python's and numpy's generators are kept as well:
layerdrop and feature masking in some models draw from them.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


def check_seed(seed: object) -> None:
    """Raise unless it is a whole number, or None."""
    if seed is not None and not hasattr(seed, "__index__"):
        raise ValueError(f"seed={seed!r}; allowed are whole numbers, or None for torch's initial seed.")


def devices_of(modules: Iterable[nn.Module]) -> list[torch.device]:
    """The devices that modules compute on."""
    # Offloaded weights are on the meta device between the calls, which says nothing of where they are brought to: then
    # every accelerator counts.
    firsts = (next(module.parameters(), None) for module in modules)
    found = dict.fromkeys(first.device for first in firsts if first is not None)
    if torch.device("meta") in found:
        del found[torch.device("meta")]
        kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        if kind is not None:
            found |= dict.fromkeys(torch.device(kind.type, i) for i in range(torch.accelerator.device_count()))
    return list(found)


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
                if device.type != "cpu"
            ),
            python=random.getstate(),
            numpy=numpy.random.get_state() if numpy is not None else None,
        )

    def torch_has_drawn(self) -> bool:
        """Whether one of torch's generators has gone on since."""
        moved = any(not torch.equal(was, torch.get_device_module(at).get_rng_state(at)) for at, was in self.devices)
        return moved or not torch.equal(self.cpu, torch.get_rng_state())

    def restore(self) -> None:
        """Put every generator back to this state."""
        torch.set_rng_state(self.cpu)
        for device, state in self.devices:
            torch.get_device_module(device).set_rng_state(state, device)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)


@contextmanager
def random_state_kept(devices: Iterable[torch.device]) -> Iterator[None]:
    """The caller's random stream goes on where it is now, whatever the block draws."""
    here = RandomState.capture(devices)
    try:
        yield
    finally:
        here.restore()


class StepDraws:
    """The regularizer's own draws in one step, which depend on (seed, step) alone: a resumed run repeats them."""

    def __init__(self, seed: int, step: int) -> None:
        self._key = f"{seed}/{step}"
        self._generators: dict[torch.device, torch.Generator] = {}

    def generator(self, device: torch.device) -> torch.Generator:
        """The generator of the auxiliary components on a device, one for the whole step."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed_of("components"))
        return self._generators[device]

    def samples(self, batch_size: int, fraction: float) -> Tensor | None:
        """Sorted numbers of a random part of the batch, at least one; None for all of it."""
        number = max(1, round(fraction * batch_size))
        if number >= batch_size:
            return None
        # The device is said: torch.set_default_device may name another one, which has other random numbers.
        generator = torch.Generator("cpu").manual_seed(self._seed_of("samples"))
        return torch.randperm(batch_size, generator=generator, device="cpu")[:number].sort().values

    def _seed_of(self, purpose: str) -> int:
        digest = hashlib.blake2b(f"{self._key}/{purpose}".encode(), digest_size=4).digest()
        return int.from_bytes(digest, "little")
