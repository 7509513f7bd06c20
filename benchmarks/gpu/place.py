"""Where a part runs: on a GPU at full size, or in a rehearsal on the processor at the smallest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


class Skipped(Exception):
    """There is nothing to do here; the message says why."""


class Device(Protocol):
    """What only a device can do. `cuda_only.Cuda` does it; `stand_in.Processor` goes through the same motions."""

    name: str
    impl: str  # of the distance
    backend: str  # of torch.distributed

    def about(self) -> dict[str, Any]:
        """Hardware and versions."""

    def synchronize(self) -> None:
        """Wait until all is done."""

    def seconds(self, function: Callable[[], Any]) -> tuple[float, Any]:
        """Time of a call on the device, its launches hidden behind other work, and what it returned."""

    def peak(self, function: Callable[[], int]) -> int:
        """Most bytes above those held before, less the bytes that the function says it hands out."""

    def held(self) -> int:
        """Bytes that are allocated."""

    def clear(self) -> None:
        """Give back what nobody holds any more."""

    def is_alive(self) -> bool:
        """Whether the device still computes."""

    def waits(self, function: Callable[[], Any]) -> dict[str, int]:
        """Lines at which the host waited for the device, and how often."""

    def beside(self, function: Callable[[], Any]) -> Any:
        """What the function returns when it runs on a stream of its own."""

    def captured(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """What the function returned while it was captured as a graph, and the graph's replay."""

    def kernels(self, function: Callable[[], Any]) -> dict[str, tuple[int, float]]:
        """What ran on the device during a call: by name, how often, and how many microseconds."""


@dataclass(frozen=True)
class Place:
    """Where, and how large.

    Attributes:
        device: to measure.
        rehearsal: whether all sizes are the smallest.
        model: folder of a model of 135 M parameters, if there is one.
    """

    device: Device
    rehearsal: bool
    model: Path | None = None

    def sized(self, full: Any, rehearsed: Any) -> Any:
        """The one or the other."""
        return rehearsed if self.rehearsal else full
