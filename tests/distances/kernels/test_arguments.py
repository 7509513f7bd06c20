"""Bad input is refused in words that name the layer and the cure."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from lfu_reg.distances.kernels import entry
from lfu_reg.distances.kernels.entry import mse_over_layers
from lfu_reg.distances.kernels.problem import describe_problems
from tests.distances.kernels.reference import make

H = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        (([H], [H, H], None), {}, ValueError, "1 clean and 2 perturbed"),
        (([], [], None), {}, ValueError, "no layers"),
        (([H, H], [H, H[:1]], None), {}, ValueError, r"Layer 1: .*\[2, 3, 4\].*\[1, 3, 4\]"),
        (([H.long()], [H], None), {}, TypeError, "Layer 0: clean is torch.int64"),
        (([H], [H.bool()], None), {}, TypeError, "Layer 0: perturbed is torch.bool"),
        (([torch.zeros(())], [torch.zeros(())], None), {}, ValueError, "scalars"),
        (([H], [H.to("meta")], None), {}, ValueError, "clean is on cpu and perturbed on meta"),
        (([H], [H], torch.ones(6, dtype=torch.bool)), {}, TypeError, r"mask.flatten\(\).nonzero\(\)"),
        (([H], [H], torch.zeros(2, dtype=torch.int32)), {}, TypeError, "int64 positions are needed"),
        (([H], [H], torch.zeros(2, 1, dtype=torch.int64)), {}, ValueError, r"shape \[2, 1\]"),
        (([H], [H], torch.zeros(7, dtype=torch.int64)), {}, ValueError, "selects 7 of 6"),
        (([H], [H], [None, None]), {}, ValueError, "2 entries for 1 layers"),
        (([H], [H], [[0, 1]]), {}, TypeError, "is a list"),
        (([H], [H], None), {"reduction": "none"}, ValueError, "'mean' and 'sum'"),
        (([H], [H], None), {"impl": "cuda"}, ValueError, "allowed are 'auto', 'torch', 'triton'."),
    ],
)
def test_refused(arguments: Any, options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        mse_over_layers(*arguments, **options)


def test_triton_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry, "_triton_installed", lambda: False)
    with pytest.raises(ValueError, match=r"lfu_reg\[triton\]"):
        mse_over_layers(*make([(2, 3)]), None, impl="triton")
    mse_over_layers(*make([(2, 3)]), None, impl="auto")


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_triton_on_a_cpu() -> None:
    with pytest.raises(ValueError, match=r"CUDA or ROCm device, not on cpu .*lfu_reg\[triton\]"):
        mse_over_layers(*make([(2, 3)]), None, impl="triton")


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_triton_with_float64() -> None:
    with pytest.raises(ValueError, match=r"not torch\.float64; .*impl='torch'"):
        mse_over_layers(*make([(2, 3)], torch.float64), None, impl="triton")


def test_importing_the_entry_does_not_import_triton() -> None:
    code = "import sys, lfu_reg.distances.kernels.entry; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], check=False).returncode == 0


def test_layers_are_grouped_by_device_and_dtypes() -> None:
    """The meta device stands for a second GPU: only descriptions are made here."""
    here, there, half = torch.zeros(2, 3, 4), torch.zeros(5, 4, device="meta"), torch.zeros(6, 4).half()
    indices = [torch.tensor([1, 2]), None, torch.tensor([4]), None, torch.tensor([0])]
    states = [here, there, here, there, half]
    first, second, third = describe_problems(states, [t.float() for t in states], indices, "mean")
    assert (first.layers, second.layers, third.layers) == ([0, 2], [1, 3], [4])
    assert (first.device.type, second.device.type) == ("cpu", "meta")
    assert third.dtypes == (torch.float16, torch.float32)
    assert (first.selected, first.divisors) == ([2, 1], [8, 4])
    assert (second.selected, second.divisors) == ([5, 5], [20, 20])
    assert (third.selected, third.divisors) == ([1], [4])


def test_an_index_is_made_readable_once() -> None:
    clean, perturbed = make([(2, 3, 4)] * 3)
    (problem,) = describe_problems(clean, perturbed, torch.arange(6)[::2], "sum")
    assert problem.index[0].tolist() == [0, 2, 4]
    assert problem.index[0].is_contiguous()
    assert all(index is problem.index[0] for index in problem.index)
    assert problem.divisors == [3, 3, 3]
