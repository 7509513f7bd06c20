"""Interleaved timing: all methods in every round, in a new order, so that a drifting machine hits all alike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

import torch

from lfu_reg.cli.methods import Method
from lfu_reg.cli.saved_bytes import SavedBytes


@dataclass(frozen=True)
class Clock:
    """Seconds on a device.

    On one CPU thread these are the processor's, which are the step's own whatever else the machine is doing; else the
    wall's, after the device has finished.
    """

    device: str

    @property
    def name(self) -> str:
        """Which time it is."""
        return "processor time, one thread" if self._processor else "wall time"

    def now(self) -> float:
        """Seconds since some moment."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)
        return time.process_time() if self._processor else time.perf_counter()

    @property
    def _processor(self) -> bool:
        return self.device == "cpu" and torch.get_num_threads() == 1


def interleaved(
    methods: Sequence[Method], clock: Clock, *, rounds: int, warmup: int, tick: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of one step of every method, by key and round.

    Args:
        methods: to be timed.
        clock: of their device.
        rounds: how often.
        warmup: rounds before, that do not count.
        tick: is called after every method of every round.
    """
    seconds: dict[str, list[float]] = {method.key: [] for method in methods}
    order = random.Random(0)
    for number in range(warmup + rounds):
        for method in order.sample(methods, len(methods)):
            start = clock.now()
            method.run()
            taken = (clock.now() - start) / method.steps
            if number >= warmup:
                seconds[method.key].append(taken)
            tick()
    return seconds


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of some values; of a single one all three are that."""
        listed = list(values)
        if len(listed) == 1:
            return cls(listed[0], listed[0], listed[0])
        low, _, high = quantiles(listed, n=4, method="inclusive")
        return cls(median(listed), low, high)


def ratios(mine: Sequence[float], base: Sequence[float]) -> Spread:
    """Of two methods' times, taken round by round."""
    return Spread.of(a / b for a, b in zip(mine, base, strict=True))


def peak_bytes(method: Method, device: str) -> int:
    """Peak of one step above what was there before: of the CUDA allocator, on CPU of the bytes saved for backward."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        method.run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with SavedBytes() as saved:
        method.run()
    return saved.peak
