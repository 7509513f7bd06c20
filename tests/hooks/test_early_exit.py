"""Pass 2 is left after the last layer, unless that would skip code or hooks of others."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
from torch import nn

from lfu_reg import LfURegularizer
from lfu_reg.hooks.early_exit import only_returns
from tests.support.harness import run_pair
from tests.support.models import LLAMA, PEFT, T5, TINY
from tests.support.plain_models import TinyLM


def plain(model: Any, batch: Any) -> Any:
    return model(batch)


def attribute(model: Any, batch: Any) -> Any:
    return model(batch).loss


def entry(model: Any, batch: Any) -> Any:
    return model(batch)[0]


def local(model: Any, batch: Any) -> Any:
    result = model(batch)
    loss = result.loss
    return loss


def arithmetic(model: Any, batch: Any) -> Any:
    return model(batch).loss * 2 + 1


def in_a_with_block(model: Any, batch: Any) -> Any:
    with torch.enable_grad():
        return model(batch)


@contextmanager
def task() -> Iterator[None]:
    """Without `finally`."""
    yield
    TASKS.clear()


TASKS: list[int] = []


def in_a_context(model: Any, batch: Any) -> Any:
    with task():
        return model(batch)


def calls(model: Any, batch: Any) -> Any:
    return next(iter(model(batch)))


def method(model: Any, batch: Any) -> Any:
    return model(batch).mean()


def stores_an_attribute(model: Any, batch: Any) -> Any:
    result = model(batch)
    model.flag = False
    return result


def stores_an_entry(model: Any, batch: Any) -> Any:
    result = model(batch)
    batch["seen"] = True
    return result


def deletes(model: Any, batch: Any) -> Any:
    result = model(batch)
    del batch["seen"]
    return result


def stores_a_global(model: Any, batch: Any) -> Any:
    global _last
    _last = model(batch)
    return _last


def conditional(model: Any, batch: Any) -> Any:
    result = model(batch)
    if result is None:
        batch.clear()
    return result


def after_a_conditional(model: Any, batch: Any) -> Any:
    if batch:
        return model(batch)
    return None


def loop(model: Any, batch: Any) -> Any:
    result = None
    for part in batch:
        result = model(part)
    return result


def generator(model: Any, batch: Any) -> Any:
    yield model(batch)


def imports(model: Any, batch: Any) -> Any:
    result = model(batch)
    import math

    return result * math.pi


def finally_calls(model: Any, batch: Any) -> Any:
    try:
        return model(batch)
    finally:
        batch.clear()


def excepts(model: Any, batch: Any) -> Any:
    try:
        return model(batch)
    except BaseException:
        batch.clear()
        raise


# Functions, and whether nothing but a return is left after the model's call.
RETURNS: dict[Any, bool] = {
    plain: True,
    attribute: True,
    entry: True,
    local: True,
    arithmetic: True,
    in_a_with_block: True,
    in_a_context: False,
    after_a_conditional: True,
    calls: False,
    method: False,
    stores_an_attribute: False,
    stores_an_entry: False,
    deletes: False,
    stores_a_global: False,
    conditional: False,
    loop: False,
    generator: False,
    imports: False,
    excepts: False,
}


def last_instruction(function: Any) -> int:
    """Where the function is while it calls the model."""
    found: list[int] = []

    class Model:
        flag = True

        def __call__(self, batch: Any) -> Any:
            frame = sys._getframe(1)
            assert frame.f_code is function.__code__
            found.append(frame.f_lasti)
            raise KeyError

    with suppress(KeyError):
        next(function(Model(), {"seen": 1}))
    return found[0]


@pytest.mark.parametrize("function", RETURNS, ids=lambda f: f.__name__)
def test_only_returns(function: Any) -> None:
    assert only_returns(function.__code__, last_instruction(function)) == RETURNS[function]


def test_finally_is_run_by_an_exception_as_well() -> None:
    """So it may be cut off or not; its code does run."""
    model, ended = LLAMA.make(), []

    def loss(m: Any, batch: Any) -> Any:
        try:
            return m(**batch).loss
        finally:
            ended.append(1)

    with LfURegularizer(model, "steering", alpha=0.1) as reg:
        for _ in range(2):
            reg(model, LLAMA.batch(), loss)
    assert len(ended) == 4


def norms_of(model: Any, loss: Any, **options: Any) -> int:
    """How often the norm after the last layer runs in the second step."""
    norms: list[int] = []
    with LfURegularizer(model, "steering", **options) as reg:
        for _ in range(2):
            handle = model.model.norm.register_forward_pre_hook(lambda *_: norms.append(1))
            norms.clear()
            reg(model, LLAMA.batch(), loss)
            handle.remove()
    return len(norms)


@pytest.mark.parametrize(("leave", "by_return", "by_code"), [("auto", 1, 2), (True, 1, 1), (False, 2, 2)], ids=str)
def test_leave_early(leave: Any, by_return: int, by_code: int) -> None:
    """Gradients and losses are the same in each case."""
    assert norms_of(LLAMA.make(), lambda m, b: m(**b).loss, leave_early=leave) == by_return
    assert norms_of(LLAMA.make(), LLAMA.loss, leave_early=leave) == by_code
    run_pair(LLAMA, "steering", reg_options={"leave_early": leave}).check()


@pytest.mark.parametrize("name", ["lora", "steering", "weights"])
def test_a_flag_that_the_loss_function_resets(name: str) -> None:
    """Without a `finally`: the function has to be run to its end."""
    model = LLAMA.make()
    flags = {"busy": False}

    def loss(m: Any, batch: Any) -> Any:
        assert not flags["busy"], "the last call was cut off"
        flags["busy"] = True
        out = m(**batch)
        flags["busy"] = False
        return out.loss

    with LfURegularizer(model, name) as reg:
        for _ in range(3):
            reg(model, LLAMA.batch(), loss).backward()
            assert not flags["busy"]
            assert float(reg.metrics["consistency_loss"]) > 0


@pytest.mark.parametrize("way", ["with", "decorator"])
def test_a_context_without_a_finally_is_not_left(way: str) -> None:
    model, flags = LLAMA.make(), {"task": 0}

    @contextmanager
    def task(number: int) -> Iterator[None]:
        flags["task"] = number
        yield
        flags["task"] = 0

    def within(m: Any, batch: Any) -> Any:
        with task(1):
            return m(**batch).loss

    loss = within if way == "with" else task(1)(lambda m, batch: m(**batch).loss)
    assert norms_of(model, loss) == 2
    assert flags["task"] == 0


def test_a_wrapper_that_resets_a_flag() -> None:
    """A module of the user's around the model, whose forward goes on."""

    log = []

    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, batch: Any) -> Any:
            loss = self.inner(**batch).loss
            log.append(1)
            return loss

    model = LLAMA.make()
    wrapper = Wrapper(model)
    with LfURegularizer(model, "steering", alpha=0.1) as reg:
        for _ in range(2):
            reg(wrapper, LLAMA.batch(), lambda m, b: m(b))
    assert len(log) == 4


# ------------------------------------------------------------------ hooks of others


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
                reg(model, LLAMA.batch(), lambda m, b: m(**b).loss).backward()
    finally:
        for handle in handles:
            handle.remove()
    assert events.count(1) == events.count(-1)
    assert len(events) > 2


def test_a_hook_that_the_loss_puts_on_the_last_layer_runs() -> None:
    """It comes after ours, and runs even where everything else may be left out."""
    model, calls = LLAMA.make(), []

    def loss(m: Any, batch: Any) -> Any:
        handle = m.model.layers[3].register_forward_hook(lambda *_: calls.append(1))
        try:
            return m(**batch).loss
        finally:
            handle.remove()

    with LfURegularizer(model, "steering", leave_early=True, alpha=0.1) as reg:
        reg(model, LLAMA.batch(), loss)
    assert len(calls) == 2


def test_hooks_that_nobody_skips_cost_nothing() -> None:
    """Those on other layers, and those inside of them and of the last one."""
    model, norms = LLAMA.make(), []
    quiet = lambda *_: None  # noqa: E731
    with LfURegularizer(model, "steering") as reg:
        model.model.layers[0].register_forward_hook(quiet)
        model.model.layers[3].mlp.register_forward_hook(quiet)
        model.model.norm.register_forward_hook(lambda *_: norms.append(1))
        for _ in range(2):
            norms.clear()
            reg(model, LLAMA.batch(), lambda m, b: m(**b).loss)
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
    reg = LfURegularizer(model, name, alpha=0.1)
    for _ in range(2):
        handle = model.get_submodule(module).register_forward_pre_hook(lambda *_: calls.append(1))
        calls.clear()
        reg(model, case.batch(), lambda m, b: m(b["input_ids"]).mean() if case is TINY else m(**b).loss)
        handle.remove()
        assert len(calls) == (2 if case is TINY else 1)  # which goes on after the model's call


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
