"""All that only CUDA reaches in this package. No other file of it names `torch.cuda`; docs/gpu.md goes through it."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lfu_reg.cli.environment import environment

FILLER = 256 << 20  # bytes; more than the L2 of any GPU, so that nothing is read from there
FILLS = 64  # about 6 ms of writing at 3 TB/s, in which the host queues the launches that are timed
ROOT = Path(__file__).resolve().parents[2]


class Cuda:
    """The current GPU."""

    name, impl, backend = "cuda", "triton", "nccl"

    def __init__(self) -> None:
        self._filler: torch.Tensor | None = None

    def about(self) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties("cuda")
        return {
            **environment("cuda"),
            "cuda": torch.version.cuda,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gb": round(properties.total_memory / 1e9, 1),
        }

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def seconds(self, function: Callable[[], Any]) -> tuple[float, Any]:
        if self._filler is None:
            self._filler = torch.empty(FILLER, dtype=torch.uint8, device="cuda")
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(FILLS):
            self._filler.zero_()
        begin.record()
        result = function()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3, result

    def peak(self, function: Callable[[], int]) -> int:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        handed_out = function()
        return torch.cuda.max_memory_allocated() - before - handed_out

    def held(self) -> int:
        return torch.cuda.memory_allocated()

    def clear(self) -> None:
        self._filler = None
        gc.collect()
        torch.cuda.empty_cache()

    def is_alive(self) -> bool:
        try:
            return torch.ones(1, device="cuda").add(1).item() == 2
        except RuntimeError:
            return False

    def waits(self, function: Callable[[], Any]) -> dict[str, int]:
        found: dict[str, int] = {}
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for warning in caught:
            if "synchroniz" in str(warning.message):
                line = f"{warning.filename.removeprefix(f'{ROOT}/')}:{warning.lineno}"
                found[line] = found.get(line, 0) + 1
        return found

    def beside(self, function: Callable[[], Any]) -> Any:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            result = function()
        torch.cuda.current_stream().wait_stream(stream)
        return result

    def captured(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        self.beside(function)  # compiles, and fills the allocator's caches
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = function()
        return result, graph.replay

    def kernels(self, function: Callable[[], Any]) -> dict[str, tuple[int, float]]:
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            function()
            torch.cuda.synchronize()
        found: dict[str, tuple[int, float]] = {}
        for event in profiled.events():
            if event.device_type == DeviceType.CUDA:
                calls, spent = found.get(event.name, (0, 0.0))
                found[event.name] = calls + 1, spent + event.time_range.elapsed_us()
        return found
