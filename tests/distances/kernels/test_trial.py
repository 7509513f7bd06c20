"""A kernel that fails or is wrong is found out on a tiny problem; the twin takes over, and the user is told once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lfu_reg import LfURegularizer, LfUWarning
from lfu_reg.distances.kernels import entry, trial
from lfu_reg.distances.kernels.autograd import Implementation
from lfu_reg.distances.kernels.entry import mse_over_layers
from lfu_reg.distances.kernels.problem import Problem
from lfu_reg.distances.kernels.torch_twin import TWIN
from tests.distances.kernels.reference import gradients, make
from tests.support.models import TINY


def raising(error: Exception) -> Implementation:
    def forward(*_: Any) -> Tensor:
        raise error

    return Implementation(forward, TWIN.backward)


def changed(values: Callable[[Tensor], Tensor]) -> Implementation:
    return Implementation(lambda *arguments: values(TWIN.forward(*arguments)), TWIN.backward)


def wrong_gradient(side: int) -> Implementation:
    def backward(*arguments: Any) -> Any:
        found = TWIN.backward(*arguments)
        # Far beyond a rounding of bfloat16.
        return tuple(
            [None if g is None else 1.1 * g for g in part] if n == side else part for n, part in enumerate(found)
        )

    return Implementation(TWIN.forward, backward)


RAISES = raising(RuntimeError("ptxas fatal: Unknown target"))
BAD = {
    "raises": RAISES,
    "wrong value": changed(lambda per_layer: per_layer * 1.001),
    "wrong layer": changed(lambda per_layer: per_layer.roll(1)),
    "not a number": changed(lambda per_layer: per_layer * float("nan")),
    "wrong gradient of h": wrong_gradient(0),
    "wrong gradient of h'": wrong_gradient(1),
}


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[Implementation], list[Problem]]:
    """Puts a kernel in the place of Triton's on a CPU that passes for a GPU; returns the problems it was given."""

    def put(kernel: Implementation) -> list[Problem]:
        given: list[Problem] = []

        def forward(problem: Problem, *states: Any) -> Tensor:
            given.append(problem)
            return kernel.forward(problem, *states)

        monkeypatch.setattr(trial, "_verdicts", {})
        monkeypatch.setattr(entry, "_use_triton", lambda problem, impl: impl != "torch")
        monkeypatch.setattr(entry, "_triton", lambda: Implementation(forward, kernel.backward))
        return given

    return put


@pytest.mark.parametrize("index", [None, torch.tensor([0, 4])], ids=["all", "some"])
@pytest.mark.parametrize("kernel", BAD.values(), ids=BAD)
def test_a_bad_kernel_is_not_used(kernel: Implementation, index: Tensor | None, install: Any) -> None:
    given = install(kernel)
    layers = make([(2, 3, 5), (2, 3, 7)], torch.bfloat16)
    expected, expected_layers = mse_over_layers(*layers, index, impl="torch")
    with pytest.warns(LfUWarning, match="Triton kernel does not work on cpu") as told:
        results = [mse_over_layers(*layers, index) for _ in range(3)]
    assert all(torch.equal(loss, expected) for loss, _ in results)
    assert all(torch.equal(per_layer, expected_layers) for _, per_layer in results)
    assert len(told) == 1
    assert len(given) == 1, "the kernel ran again after it had failed"
    text = str(told[0].message)
    assert "Unknown target" in text if kernel is RAISES else "off by" in text
    assert torch.__version__ in text
    assert "impl='torch'" in text
    gradients(expected, layers[1])


def test_a_good_kernel_is_used(install: Any) -> None:
    given = install(TWIN)
    layers = make([(2, 3, 5)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            mse_over_layers(*layers, None)
    assert [len(problem.layers) for problem in given] == [2, 1, 1, 1], "one trial of two layers, then the problems"


def test_each_pair_of_dtypes_is_tried(install: Any) -> None:
    given = install(TWIN)
    for _ in range(2):
        mse_over_layers(*make([(2, 3, 5)], torch.bfloat16), None)
        mse_over_layers(*make([(2, 3, 5)], torch.bfloat16, torch.float32), None)
        mse_over_layers(*make([(2, 3, 9)], torch.bfloat16), None)
    assert len(given) == 6 + 2


def test_who_insists_gets_the_error(install: Any) -> None:
    install(RAISES)
    with pytest.raises(RuntimeError, match="Unknown target"):
        mse_over_layers(*make([(2, 3, 5)]), None, impl="triton")


def test_memory_that_runs_out_is_no_verdict(install: Any) -> None:
    install(raising(torch.OutOfMemoryError("full")))
    with pytest.raises(torch.OutOfMemoryError):
        mse_over_layers(*make([(2, 3, 5)]), None)
    assert trial._verdicts == {}


def test_a_trial_leaves_no_trace(install: Any) -> None:
    install(TWIN)
    layers = make([(2, 3, 5)])
    state = torch.get_rng_state()
    with torch.no_grad():
        loss, _ = mse_over_layers(*layers, None)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert not loss.requires_grad
    assert all(t.grad is None for side in layers for t in side)


def test_training_goes_on(install: Any) -> None:
    results = []
    for kernel in (RAISES, TWIN):
        install(kernel)
        model = TINY.make().float()
        reg = LfURegularizer(model, "steering", alpha=0.05, lam=1.0)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for _ in range(2):
                reg(model, TINY.batch(), TINY.loss).backward()
        assert [w.category for w in told if "kernel" in str(w.message)] == [LfUWarning] * (kernel is RAISES)
        results.append(reg.metrics["consistency_loss"])
    assert results[0] == results[1] > 0
