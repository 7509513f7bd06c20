"""Bad input is refused in words that name the layer and the cure."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from lfu_reg.distances.kernels import mse_over_layers as entry
from lfu_reg.distances.kernels.mse_over_layers import mse_over_layers
from lfu_reg.distances.kernels.mse_problem import describe_problems
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
        (([H], [H], None, [1.0, 2.0]), {}, ValueError, "2 weights for 1 layers"),
        (([H], [H], None, torch.ones(2)), {}, ValueError, r"\[1\] is needed"),
        (([H], [H], None, torch.ones(1, requires_grad=True)), {}, ValueError, "detach"),
        (([H], [H], None), {"reduction": "none"}, ValueError, "'mean' and 'sum'"),
        (([H], [H], None), {"stop_gradient": "both"}, ValueError, "'clean', 'perturbed' and 'none'"),
        (([H], [H], None), {"impl": "cuda"}, ValueError, "allowed are 'auto', 'torch', 'triton', 'native'"),
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
    with pytest.raises(ValueError, match="impl='torch' for float64"):
        mse_over_layers(*make([(2, 3)], torch.float64), None, impl="triton")


def test_weights_are_used_as_given() -> None:
    clean, perturbed = make([(2, 3, 4)] * 3)
    _, per_layer = mse_over_layers(clean, perturbed, None)
    for weights in ([2.0, 0.0, -1.0], torch.tensor([2.0, 0.0, -1.0], dtype=torch.float64)):
        loss, same = mse_over_layers(clean, perturbed, None, weights)
        assert torch.equal(same, per_layer)
        torch.testing.assert_close(loss, 2 * per_layer[0] - per_layer[2])


def test_importing_the_entry_does_not_import_triton() -> None:
    code = "import sys, lfu_reg.distances.kernels.mse_over_layers; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], check=False).returncode == 0


def test_layers_are_split_by_device() -> None:
    """The meta device stands for a second GPU: only descriptions are made here."""
    here, there = torch.zeros(2, 3, 4), torch.zeros(5, 4, device="meta")
    indices = [torch.tensor([1, 2]), None, torch.tensor([4]), None]
    lists = [here, there, here, there], [t.clone().requires_grad_() for t in (here, there, here, there)]
    for weights in ([1.0, 2.0, 3.0, 4.0], torch.tensor([1.0, 2.0, 3.0, 4.0])):
        first, second = describe_problems(*lists, indices, weights, "mean", "clean", False)
        assert (first.layers, second.layers) == ([0, 2], [1, 3])
        assert (first.device.type, second.device.type) == ("cpu", "meta")
        assert first.scales == [1 / 8, 1 / 4]
        assert second.scales == [1 / 20, 1 / 20]
        assert second.kinds.of_layer == (0, 0)
        assert [float(w) for w in first.weights] == [1.0, 3.0]
        assert len(second.weights) == 2
        assert all(t.device == problem.device for problem in (first, second) for t in problem.clean)


def test_what_follows_from_shapes_is_worked_out_once() -> None:
    clean, perturbed = make([(2, 3, 4)] * 3)
    first, second = (describe_problems(clean, perturbed, i, None, "mean", "clean", False)[0] for i in (None, None))
    assert first.kinds is second.kinds
    lengths = [torch.arange(n) for n in (2, 5)]  # as many as there are tokens in a response: new at every step
    first, second = (describe_problems(clean, perturbed, i, None, "mean", "clean", False)[0] for i in lengths)
    assert first.kinds is second.kinds
    assert (first.scales[0], second.scales[0]) == (1 / 8, 1 / 20)
