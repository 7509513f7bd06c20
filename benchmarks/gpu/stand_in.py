"""The processor in the place of a GPU, for a rehearsal: the calls of `cuda_only.Cuda`, and figures without meaning."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


class Processor:
    """Has the methods of a `Device`."""

    name, impl, backend = "cpu", "torch", "gloo"

    def about(self) -> dict[str, Any]:
        from lfu_reg.cli.environment import environment

        return environment("cpu")

    def synchronize(self) -> None: ...

    def seconds(self, function: Callable[[], Any]) -> tuple[float, Any]:
        start = time.perf_counter()
        result = function()
        return time.perf_counter() - start, result

    def peak(self, function: Callable[[], int]) -> int:
        return function()

    def held(self) -> int:
        return 0

    def clear(self) -> None: ...

    def is_alive(self) -> bool:
        return True

    def waits(self, function: Callable[[], Any]) -> dict[str, int]:
        function()
        return {}

    def beside(self, function: Callable[[], Any]) -> Any:
        return function()

    def captured(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        result = function()
        return result, lambda: result.copy_(function())

    def kernels(self, function: Callable[[], Any]) -> dict[str, tuple[int, float]]:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            function()
        return {e.key: (e.count, e.self_cpu_time_total) for e in profiled.key_averages()}
