"""A kernel that fails or is wrong is found out on a tiny problem; the twin takes over, and the user is told once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lfu_reg import LfURegularizer, LfUWarning
from lfu_reg.distances.kernels import mse_over_layers as entry
from lfu_reg.distances.kernels import mse_torch, mse_trial
from lfu_reg.distances.kernels.mse_over_layers import mse_over_layers
from lfu_reg.distances.kernels.mse_problem import Problem
from tests.distances.kernels.reference import gradients, make
from tests.support.models import TINY

Result = tuple[Tensor, Tensor]


class _Scaled(torch.autograd.Function):
    """Right forward, wrong backward."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        return 1.1 * upstream  # far beyond a rounding of bfloat16


def raises(_: Problem) -> Result:
    raise RuntimeError("ptxas fatal: Unknown target")


def wrong_value(problem: Problem) -> Result:
    loss, per_layer = mse_torch.run(problem)
    return loss * 1.001, per_layer


def wrong_layer(problem: Problem) -> Result:
    loss, per_layer = mse_torch.run(problem)
    return loss, per_layer.roll(1)


def wrong_gradient(problem: Problem) -> Result:
    loss, per_layer = mse_torch.run(problem)
    return _Scaled.apply(loss), per_layer


def not_a_number(problem: Problem) -> Result:
    loss, per_layer = mse_torch.run(problem)
    return loss * float("nan"), per_layer


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Problem], Result]], list[Problem]]:
    """Puts a launcher in the place of Triton's on a CPU that passes for a GPU; returns the problems it was given."""

    def put(launcher: Callable[[Problem], Result]) -> list[Problem]:
        given: list[Problem] = []

        def run(problem: Problem) -> Result:
            given.append(problem)
            return launcher(problem)

        monkeypatch.setattr(mse_trial, "_verdicts", {})
        monkeypatch.setattr(entry, "_use_triton", lambda problem, impl: impl != "torch")
        monkeypatch.setattr(entry, "_by_triton", run)
        return given

    return put


@pytest.mark.parametrize("index", [None, torch.tensor([0, 4])], ids=["all", "some"])
@pytest.mark.parametrize("launcher", [raises, wrong_value, wrong_layer, wrong_gradient, not_a_number])
def test_a_bad_kernel_is_not_used(launcher: Any, index: Tensor | None, install: Any) -> None:
    given = install(launcher)
    layers = make([(2, 3, 5), (2, 3, 7)], torch.bfloat16)
    expected, expected_layers = mse_over_layers(*layers, index, impl="torch")
    with pytest.warns(LfUWarning, match="Triton kernel does not work on cpu") as told:
        results = [mse_over_layers(*layers, index) for _ in range(3)]
    assert all(torch.equal(loss, expected) for loss, _ in results)
    assert all(torch.equal(per_layer, expected_layers) for _, per_layer in results)
    assert len(told) == 1
    assert len(given) == 1, "the launcher ran again after it had failed"
    text = str(told[0].message)
    assert "Unknown target" in text if launcher is raises else "off by" in text
    assert torch.__version__ in text
    assert "impl='torch'" in text
    gradients(expected, layers[1])


def test_a_good_kernel_is_used(install: Any) -> None:
    given = install(mse_torch.run)
    layers = make([(2, 3, 5)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            mse_over_layers(*layers, None)
    assert [len(problem.layers) for problem in given] == [2, 1, 1, 1], "one trial of two layers, then the problems"


def test_each_pair_of_dtypes_is_tried(install: Any) -> None:
    given = install(mse_torch.run)
    for _ in range(2):
        mse_over_layers(*make([(2, 3, 5)], torch.bfloat16), None)
        mse_over_layers(*make([(2, 3, 5)], torch.bfloat16, torch.float32), None)
        mse_over_layers(*make([(2, 3, 9)], torch.bfloat16), None)
    assert len(given) == 6 + 2


def test_who_insists_gets_the_error(install: Any) -> None:
    install(raises)
    with pytest.raises(RuntimeError, match="Unknown target"):
        mse_over_layers(*make([(2, 3, 5)]), None, impl="triton")


def test_memory_that_runs_out_is_no_verdict(install: Any) -> None:
    def full(_: Problem) -> Result:
        raise torch.OutOfMemoryError("full")

    install(full)
    with pytest.raises(torch.OutOfMemoryError):
        mse_over_layers(*make([(2, 3, 5)]), None)
    assert mse_trial._verdicts == {}


def test_a_trial_leaves_no_trace(install: Any) -> None:
    install(mse_torch.run)
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
    for launcher in (raises, mse_torch.run):
        install(launcher)
        model = TINY.make().float()
        reg = LfURegularizer(model, "steering", alpha=0.05, lam=1.0)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for _ in range(2):
                reg(model, TINY.batch(), TINY.loss).backward()
        assert [w.category for w in told if "kernel" in str(w.message)] == [LfUWarning] * (launcher is raises)
        results.append(reg.metrics["consistency_loss"])
    assert results[0] == results[1] > 0
