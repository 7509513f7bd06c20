"""DeepSpeed: each check of `checks_deepspeed.py` on two processes, where it is installed; and what holds without it."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import nn

from lfu_reg import LfURegularizer
from tests.distributed.launch import Results, launch
from tests.support.models import TINY
from tests.support.refusals import says

CHECKS = ("check_zero_0_to_2", "check_the_engine_is_refused")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    return launch("tests.distributed.checks_deepspeed", tmp_path_factory.mktemp("deepspeed"))


@pytest.mark.parametrize("check", CHECKS)
def test_deepspeed(check: str, results: Results) -> None:
    results.expect(check)


def test_an_engine_is_refused() -> None:
    class DeepSpeedEngine(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    model = TINY.make()
    with LfURegularizer(model, "steering") as reg, pytest.raises(ValueError, match=says("engine.module", "backward")):
        reg(DeepSpeedEngine(model), TINY.batch(), lambda engine, batch: TINY.loss(engine.module, batch))


def test_the_step_itself_runs_no_backward_into_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO's hooks sit where gradients are accumulated: there nothing arrives before the caller's backward."""
    model = TINY.make()
    arrived: list[str] = []
    for name, parameter in model.named_parameters():
        node: Any = parameter.view_as(parameter).grad_fn
        accumulator = node.next_functions[0][0]
        accumulator.register_hook(lambda *_, name=name: arrived.append(name))
        parameter.kept = accumulator  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.Tensor, "backward", lambda *_: pytest.fail("backward() was called"))
    loss = LfURegularizer(model, "lora")(model, TINY.batch(), TINY.loss)
    assert not arrived
    assert all(parameter.grad is None for parameter in model.parameters())
    monkeypatch.undo()
    loss.backward()
    assert sorted(arrived) == sorted(name for name, _ in model.named_parameters())
