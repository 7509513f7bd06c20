"""Pass 2 is left after the last layer, unless that would skip hooks of others."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from lfu_reg import LfURegularizer
from tests.support.models import LLAMA, PEFT, T5, TINY
from tests.support.plain_models import TinyLM

REGISTER = {
    "plain": lambda module, hook: module.register_forward_hook(hook),
    "always_call": lambda module, hook: module.register_forward_hook(hook, always_call=True),
}


@pytest.mark.parametrize("kind", REGISTER)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("where", ["model", "model.layers.0", "model.layers.3", "model.norm", "everywhere"])
def test_pairs_of_hooks_stay_balanced(where: str, when: str, kind: str) -> None:
    """A pre-hook that opens something has its forward hook close it, at every call."""
    model, events = LLAMA.make(), []

    def register() -> list[Any]:
        opened = lambda *_: events.append(1)  # noqa: E731
        closed = lambda *_: events.append(-1)  # noqa: E731
        if where == "everywhere":
            always = kind == "always_call"
            return [
                nn.modules.module.register_module_forward_pre_hook(opened),
                nn.modules.module.register_module_forward_hook(closed, always_call=always),
            ]
        module = model.get_submodule(where)
        return [module.register_forward_pre_hook(opened), REGISTER[kind](module, closed)]

    handles = register() if when == "before" else []
    try:
        with LfURegularizer(model, "steering") as reg:
            handles += register() if when == "after" else []
            for _ in range(2):
                reg(model, LLAMA.batch(), LLAMA.loss).backward()
    finally:
        for handle in handles:
            handle.remove()
    assert events.count(1) == events.count(-1)
    assert len(events) > 2


def test_hooks_that_nobody_skips_cost_nothing() -> None:
    """Those before ours on the last layer, those on other layers and those inside of them."""
    model, norms = LLAMA.make(), []
    quiet = lambda *_: None  # noqa: E731
    model.model.layers[3].register_forward_hook(quiet)
    with LfURegularizer(model, "steering") as reg:
        model.model.layers[0].register_forward_hook(quiet)
        model.model.layers[3].mlp.register_forward_hook(quiet)
        model.model.norm.register_forward_hook(lambda *_: norms.append(1))
        for _ in range(2):
            norms.clear()
            reg(model, LLAMA.batch(), LLAMA.loss)
    assert len(norms) == 1


AFTER_THE_LAYERS = {
    "llama": (LLAMA, "model.norm"),
    "peft": (PEFT, "base_model.model.model.norm"),
    "t5": (T5, "decoder.final_layer_norm"),
    "tiny": (TINY, "norm"),
}


@pytest.mark.parametrize(("case", "module"), AFTER_THE_LAYERS.values(), ids=AFTER_THE_LAYERS)
@pytest.mark.parametrize("name", ["lora", "steering", "weights"])
def test_what_pass_2_leaves_out(case: Any, module: str, name: str) -> None:
    """With nobody else's hooks on the way, also where the model has copies of ours, the last norm runs once a step."""
    model, calls = case.make(), []
    reg = LfURegularizer(model, name)
    for _ in range(2):  # a check of the replay is left early, too
        handle = model.get_submodule(module).register_forward_pre_hook(lambda *_: calls.append(1))
        calls.clear()
        reg(model, case.batch(), case.loss)
        handle.remove()
        assert len(calls) == 1


def test_inner_hooks_of_a_model_as_a_layer() -> None:
    """Where logits are compared, the model itself is what the forward is left from."""
    model, events = TINY.make(), []
    with LfURegularizer(model, "steering", distance="logit_kl") as reg:
        model.register_forward_pre_hook(lambda *_: events.append(1))
        model.register_forward_hook(lambda *_: events.append(-1))
        for _ in range(2):
            reg(model, TINY.batch(), TINY.loss)
    assert isinstance(model, TinyLM)
    assert sum(events) == 0
    assert events
