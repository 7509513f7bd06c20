"""Hooks that do not fire: an error or one word about it, never a term that is silently zero somewhere."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfu_reg import LfURegularizer, LfUWarning
from tests.support.architectures import MAMBA_CALLS_DT_PROJ
from tests.support.cases import plain_loss, seeded
from tests.support.harness import auxiliary
from tests.support.models import ENCODER, MAMBA, TINY
from tests.support.plain_models import ResidualBlock, TinyLM
from tests.support.refusals import refuses, refuses_step


class Lending(ResidualBlock):
    """Uses the weights of one of its linear maps without calling it."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + F.linear(torch.tanh(self.up(self.norm(hidden))), self.down.weight, self.down.bias)


def with_blocks(make: Callable[[], nn.Module]) -> TinyLM:
    model = seeded(TinyLM)
    model.blocks = nn.ModuleList(make() for _ in range(3)).double()
    return model


def warnings_of(steps: int, model: nn.Module, case: Any = TINY, name: str = "lora") -> list[str]:
    reg = LfURegularizer(model, auxiliary(name))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            reg(model, case.batch(), case.loss)
    return [str(w.message) for w in caught if w.category is LfUWarning]


def test_a_weight_that_is_lent_is_told_once() -> None:
    (told,) = warnings_of(2, with_blocks(lambda: Lending(8)))
    assert "blocks.0.down, blocks.1.down, blocks.2.down." in told
    assert "target_modules" in told


calls_it = pytest.mark.skipif(MAMBA_CALLS_DT_PROJ, reason="an older transformers calls it")


@calls_it
def test_mambas_lent_weight() -> None:
    (told,) = warnings_of(2, MAMBA.make(), MAMBA)
    assert told.split(":")[1].count(".dt_proj") == len(MAMBA.layers)


def test_nothing_to_tell_of_attention_that_lends_its_last_weight() -> None:
    assert not warnings_of(2, ENCODER.make(), ENCODER)


@pytest.mark.parametrize("name", ["steering", "weights"])
def test_nothing_to_tell_where_linear_maps_do_not_matter(name: str) -> None:
    assert not warnings_of(1, with_blocks(lambda: Lending(8)), name=name)


def test_leaving_them_out_gives_silence() -> None:
    model = with_blocks(lambda: Lending(8))
    reg = LfURegularizer(model, auxiliary("lora", target_modules=["up"]))
    assert float(reg(model, TINY.batch(), TINY.loss).detach()) > 0


class Routed(ResidualBlock):
    """Chooses its second linear map by the values that come in: a perturbation changes the choice."""

    calls = 0

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + torch.tanh(self.up(hidden))[..., : hidden.shape[-1]]
        Routed.calls += 1
        return hidden + self.down(self.up(hidden)) if Routed.calls == 1 else hidden


def test_another_count_in_pass_2_is_told() -> None:
    Routed.calls = 0
    model = seeded(TinyLM)
    model.blocks = nn.ModuleList([Routed(8)]).double()
    reg = LfURegularizer(model, auxiliary("lora"), layers=["blocks.0"], alpha=0.1)  # given: else a try would tell
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reg(model, TINY.batch(), TINY.loss)
    assert any("another number of times" in str(w.message) and "blocks.0.down" in str(w.message) for w in caught)


def test_called_as_forward_inside_a_layer() -> None:
    class Bypass(ResidualBlock):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden + self.down(torch.tanh(self.up.forward(self.norm(hidden))))

    (told,) = warnings_of(1, with_blocks(lambda: Bypass(8)))
    assert "blocks.0.up" in told
    assert "call module(x)" in told


class Keywords(ResidualBlock):
    def forward(self, *, hidden: Tensor) -> Tensor:
        return hidden + self.down(input=torch.tanh(self.up(input=self.norm(hidden))))


class KeywordLM(TinyLM):
    def body(self, hidden: Tensor) -> Tensor:
        for block in self.blocks:
            steps = torch.arange(1, hidden.shape[1] + 1, dtype=hidden.dtype)
            hidden = block(hidden=hidden.cumsum(1) / steps[:, None])
        return self.norm(hidden.flatten(0, 1)).view_as(hidden)


@pytest.mark.parametrize("name", ["lora", "steering", "weights"])
def test_keyword_only_calls(name: str) -> None:
    plain = TINY.make()
    model = seeded(KeywordLM)
    model.blocks = nn.ModuleList(Keywords(8) for _ in range(3)).double()
    model.load_state_dict(plain.state_dict())
    losses = [LfURegularizer(m, auxiliary(name), seed=1)(m, TINY.batch(), TINY.loss).detach() for m in (model, plain)]
    assert torch.equal(*losses)


def test_a_module_that_runs_twice_is_compared_call_by_call() -> None:
    class Looped(TinyLM):
        def body(self, hidden: Tensor) -> Tensor:
            return self.norm(self.blocks[0](self.blocks[0](hidden)).flatten(0, 1)).view_as(hidden)

    model = seeded(Looped)
    reg = LfURegularizer(model, auxiliary("steering"), layers=["blocks.0"])
    reg(model, TINY.batch(), TINY.loss)
    distances = [float(reg.metrics[f"distance/blocks.0[{call}]"]) for call in range(2)]
    assert distances[0] != distances[1]
    assert min(distances) > 0


@pytest.mark.parametrize("transform", ["vmap", "grad"])
def test_transforms_of_torch_func(transform: str) -> None:
    def loss(model: Any, batch: Any) -> Tensor:
        if transform == "vmap":
            logits = torch.func.vmap(lambda ids: model(ids[None])[0])(batch["input_ids"])
            return logits.square().mean()
        weights = {name: p for name, p in model.named_parameters() if name == "head.weight"}

        def of(changed: Any) -> Tensor:
            return plain_loss(lambda ids: torch.func.functional_call(model, changed, (ids,)), batch)

        return torch.func.grad(of)(weights)["head.weight"].square().sum()

    refuses_step(("torch.func", "outside"), loss=loss)


def test_scripted_layers() -> None:
    model = TINY.make()
    model.blocks[1] = torch.jit.trace(model.blocks[1], torch.zeros(1, 2, 8, dtype=torch.float64))
    refuses(model, ("blocks.1", "ScriptModule", "torch.compile"), "steering", layers=["blocks.1"])


def test_the_error_of_silent_layers_names_compilation() -> None:
    refuses_step(("torch.compiler.reset()",), loss=lambda model, batch: model.head.weight.square().sum())
