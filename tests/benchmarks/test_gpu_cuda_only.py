"""The calls that only CUDA reaches, against stand-ins with the signatures of the real ones."""

from __future__ import annotations

import ast
import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from gpu import cuda_only, stand_in
from gpu.cuda_only import Cuda
from gpu.place import Device

CALLS = [name for name, value in vars(Device).items() if callable(value) and not name.startswith("_")]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    """torch.cuda as the file sees it: only what exists can be called, and only as it can be called."""
    fake = mock.create_autospec(torch.cuda)
    fake.stream.side_effect = lambda stream: contextlib.nullcontext()
    fake.graph.side_effect = lambda graph: contextlib.nullcontext()
    seen = SimpleNamespace(
        cuda=fake,
        version=torch.version,
        uint8=torch.uint8,
        Tensor=torch.Tensor,
        empty=lambda *shape, dtype, device: mock.Mock(name="filler"),
        ones=lambda number, device: torch.ones(number),
    )
    monkeypatch.setattr(cuda_only, "torch", seen)
    return fake


def names(fake: Any) -> list[str]:
    return [call[0] for call in fake.mock_calls]


def test_nothing_else_in_the_package_names_cuda() -> None:
    for file in Path(cuda_only.__file__).parent.glob("*.py"):
        if file.name != "cuda_only.py":
            found = [
                ast.unparse(node)
                for node in ast.walk(ast.parse(file.read_text()))
                if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.cuda")
            ]
            assert not found, f"{file.name}: {found}"


@pytest.mark.parametrize("name", CALLS)
def test_the_stand_in_has_the_same_calls(name: str) -> None:
    assert callable(getattr(Cuda, name))
    assert callable(getattr(stand_in.Processor, name))


def test_a_call_is_timed_behind_other_work(cuda: Any) -> None:
    order: list[str] = []
    events = [mock.Mock(), mock.Mock()]
    cuda.Event.side_effect = events
    for name, event in zip(("begin", "end"), events, strict=True):
        event.record.side_effect = lambda name=name: order.append(name)
    events[0].elapsed_time.side_effect = lambda end: order.append("read") or 2.5
    cuda.synchronize.side_effect = lambda: order.append("wait")
    here = Cuda()
    here._filler = mock.Mock()
    here._filler.zero_.side_effect = lambda: order.append("fill")
    assert here.seconds(lambda: order.append("call")) == (0.0025, None)
    assert order == ["fill"] * cuda_only.FILLS + ["begin", "call", "end", "wait", "read"]
    events[0].elapsed_time.assert_called_once_with(events[1])
    cuda.Event.assert_called_with(enable_timing=True)


def test_the_filler_is_made_at_the_first_call_and_given_back(cuda: Any) -> None:
    cuda.Event.return_value.elapsed_time.return_value = 1.0
    here = Cuda()
    here.seconds(int)
    first = here._filler
    cuda.Event.return_value.elapsed_time.return_value = 1.0
    here.seconds(int)
    assert here._filler is first
    here.clear()
    assert here._filler is None
    cuda.empty_cache.assert_called_once_with()


def test_the_peak_is_above_what_was_held_and_less_what_is_handed_out(cuda: Any) -> None:
    cuda.memory_allocated.return_value = 100
    cuda.max_memory_allocated.return_value = 190
    assert Cuda().peak(lambda: 30) == 60
    assert names(cuda) == ["synchronize", "memory_allocated", "reset_peak_memory_stats", "max_memory_allocated"]
    assert Cuda().held() == 100


def test_a_device_is_alive_as_long_as_it_computes(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Cuda().is_alive()

    def lost(number: int, device: str) -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(cuda_only.torch, "ones", lost)
    assert not Cuda().is_alive()


def test_lines_that_wait_are_counted(cuda: Any) -> None:
    def waits() -> None:
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    ((line, number),) = Cuda().waits(waits).items()
    assert line.startswith("tests/benchmarks/test_gpu_cuda_only.py:")
    assert number == 2
    assert cuda.set_sync_debug_mode.call_args_list == [mock.call("warn"), mock.call("default")]


def test_waiting_is_allowed_again_after_an_error(cuda: Any) -> None:
    with pytest.raises(ZeroDivisionError):
        Cuda().waits(lambda: 1 // 0)
    assert cuda.set_sync_debug_mode.call_args_list[-1] == mock.call("default")


def test_a_stream_waits_before_and_is_waited_for(cuda: Any) -> None:
    assert Cuda().beside(lambda: 7) == 7
    stream, current = cuda.Stream.return_value, cuda.current_stream.return_value
    stream.wait_stream.assert_called_once_with(current)
    current.wait_stream.assert_called_once_with(stream)


def test_a_capture_is_warmed_up_before(cuda: Any) -> None:
    called: list[int] = []
    result, replay = Cuda().captured(lambda: called.append(0) or len(called))
    assert result == 2
    cuda.graph.assert_called_once_with(cuda.CUDAGraph.return_value)
    assert replay == cuda.CUDAGraph.return_value.replay


def test_kernels_are_those_of_the_device(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.autograd import DeviceType

    def event(name: str, where: Any, us: float) -> Any:
        return SimpleNamespace(name=name, device_type=where, time_range=SimpleNamespace(elapsed_us=lambda: us))

    events = [
        event("mm", DeviceType.CPU, 90.0),
        event("gemm", DeviceType.CUDA, 5.0),
        event("gemm", DeviceType.CUDA, 6.0),
    ]

    @contextlib.contextmanager
    def profile(activities: Any) -> Iterator[Any]:
        yield SimpleNamespace(events=lambda: events)

    monkeypatch.setattr(torch.profiler, "profile", profile)
    assert Cuda().kernels(int) == {"gemm": (2, 11.0)}
    cuda.synchronize.assert_called_once_with()


def test_what_it_says_of_itself(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(major=9, minor=0, total_memory=85_000_000_000)
    cuda.get_device_properties.return_value = properties
    monkeypatch.setattr(cuda_only, "environment", lambda device: {"commit": "abc", "hardware": device})
    about = Cuda().about()
    assert about["capability"] == "9.0"
    assert about["memory_gb"] == 85.0
