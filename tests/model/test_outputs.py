"""Whatever a layer returns: the same type comes back, only the hidden state in it changes; dtypes stay."""

from __future__ import annotations

from collections import namedtuple
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from lfu_reg import LfURegularizer, LfUWarning
from tests.support.cases import Case, seeded
from tests.support.compare import assert_same_gradients, gradients_of
from tests.support.harness import auxiliary, run_pair
from tests.support.models import LLAMA, PEFT, TINY
from tests.support.plain_models import ResidualBlock, TinyLM

Pair = namedtuple("Pair", "hidden extra")
AUXILIARIES = ("lora", "steering", "weights")

PACK: dict[str, Any] = {
    "tensor": lambda h, extra: h,
    "tuple": lambda h, extra: (h, extra, None),
    "one": lambda h, extra: (h,),
    "list": lambda h, extra: [h, extra],
    "dict": lambda h, extra: {"hidden_states": h, "extra": extra},
    "ModelOutput": lambda h, extra: BaseModelOutput(last_hidden_state=h, attentions=(extra,)),
    "namedtuple": Pair,
    "nested": lambda h, extra: ((h, extra), 3),
}


def unpack(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = next(iter(output.values())) if hasattr(output, "values") else output[0]
    return output


class PackingBlock(ResidualBlock):
    kind = "tensor"

    def forward(self, hidden: Tensor) -> Any:  # type: ignore[override]
        return PACK[self.kind](super().forward(hidden), hidden.sum())


class PackingLM(TinyLM):
    keyword = False

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.types = kind, []
        for block in self.blocks:
            block.__class__ = PackingBlock
            block.kind = kind

    def body(self, hidden: Tensor) -> Tensor:
        for block in self.blocks:
            output = block(hidden=hidden) if self.keyword else block(hidden)
            self.types.append(type(output))
            hidden = unpack(output)
        return self.norm(hidden.flatten(0, 1)).view_as(hidden)


def packing_case(kind: str, keyword: bool = False) -> Case:
    def make() -> PackingLM:
        model = seeded(lambda: PackingLM(kind))
        model.keyword = keyword
        return model

    return Case("", make, TINY.batch, TINY.loss, TINY.mask, TINY.layers, 6)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", AUXILIARIES)
@pytest.mark.parametrize("kind", PACK)
def test_containers(kind: str, name: str, size: int) -> None:
    case = packing_case(kind)
    pair = run_pair(case, name, batch=TINY.batch(2, shape=(size, 7)))
    pair.check()
    expected = type(PACK[kind](torch.zeros(1), torch.zeros(1)))
    assert set(pair.model.types) == {expected}


@pytest.mark.parametrize("kind", ["tensor", "tuple"])
@pytest.mark.parametrize("name", AUXILIARIES)
def test_layers_called_by_keyword(name: str, kind: str) -> None:
    run_pair(packing_case(kind, keyword=True), name).check()


def test_only_the_hidden_state_changes() -> None:
    model = packing_case("tuple").make()
    seen: list[Any] = []
    reg = LfURegularizer(model, "steering")
    model.blocks[0].register_forward_hook(lambda m, a, out: seen.append(out))
    reg(model, TINY.batch(), TINY.loss)
    clean, perturbed = seen[0], seen[-1]
    assert not torch.equal(clean[0], perturbed[0])
    assert torch.equal(clean[1], perturbed[1])
    assert clean[2] is perturbed[2] is None


class InPlaceLM(TinyLM):
    """What a block returned is changed in place afterwards."""

    def body(self, hidden: Tensor) -> Tensor:
        for block in self.blocks:
            hidden = block(hidden).relu_()
        return self.norm(hidden.flatten(0, 1)).view_as(hidden)


@pytest.mark.parametrize("strategy", ["released", "retained"])
@pytest.mark.parametrize("name", AUXILIARIES)
def test_outputs_changed_in_place_afterwards(name: str, strategy: str) -> None:
    case = Case("", lambda: seeded(InPlaceLM), TINY.batch, TINY.loss, TINY.mask, TINY.layers, 6)
    for _ in range(2):
        run_pair(case, name, reg_options={"strategy": strategy}).check()


class LaterInPlaceLM(TinyLM):
    """Writes over what its blocks return from a certain step on."""

    writes = False

    def body(self, hidden: Tensor) -> Tensor:
        for block in self.blocks:
            hidden = block(hidden).relu_() if self.writes else block(hidden).relu()
        return hidden


def test_outputs_changed_in_place_for_the_first_time() -> None:
    """Their clean states are lost at that step, which is plain SFT, and copied from the next one on."""
    model = seeded(LaterInPlaceLM)
    with LfURegularizer(model, "steering", alpha=0.05) as reg:
        for step in range(4):
            model.writes = step > 1
            with pytest.warns(LfUWarning, match="for the first time") if step == 2 else nullcontext():
                reg(model, TINY.batch(), TINY.loss).backward()
            assert ("ascent_grad_norm" in reg.metrics) == (step != 2)


class AddsInPlace(nn.Module):
    """hidden += change, and the same tensor is returned: every layer writes over the last one's output."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden += torch.tanh(self.inner(hidden.clone()))
        return hidden


class AddsInPlaceLM(TinyLM):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(AddsInPlace() for _ in range(3))

    def body(self, hidden: Tensor) -> Tensor:
        hidden = hidden * 1.0
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


@pytest.mark.parametrize("name", ["steering", "weights"])
def test_layers_that_write_over_each_other(name: str) -> None:
    case = Case("", lambda: seeded(AddsInPlaceLM), TINY.batch, TINY.loss, TINY.mask, TINY.layers, 3)
    pair = run_pair(case, name)
    pair.check()
    assert len({id(s) for s in pair.want.layer_distances}) == 3


@pytest.mark.parametrize("case", [LLAMA, PEFT], ids=lambda c: c.name)
@pytest.mark.parametrize("name", [*AUXILIARIES, "random"])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_bfloat16(case: Case, name: str, autocast: bool) -> None:
    """Layers return the dtype that they return without a regularizer, in both passes."""
    model = case.make().float() if autocast else case.make().to(torch.bfloat16)
    dtypes: list[torch.dtype] = []

    def loss(m: Any, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return case.loss(m, batch).float()

    def watched() -> Any:
        names = [n for n, module in model.named_modules() if n.endswith(("_proj", ".mlp")) or n in case.layers]
        hooks = [
            model.get_submodule(n).register_forward_hook(
                lambda m, a, out: dtypes.append((out[0] if isinstance(out, tuple) else out).dtype)
            )
            for n in names
        ]
        return hooks

    hooks = watched()
    loss(model, case.batch())
    plain = list(dtypes)
    for hook in hooks:
        hook.remove()
    dtypes.clear()
    aux = name if name == "random" else auxiliary(name)
    reg = LfURegularizer(model, aux, alpha=0.05, lam=0.7)
    watched()
    total = reg(model, case.batch(), loss)
    total.backward()
    assert dtypes[: len(plain)] == plain
    # Pass 2 comes last, and may end in the last layer before this test's hook on it.
    assert plain in (dtypes[-len(plain) :], [*dtypes[1 - len(plain) :], plain[-1]])
    assert torch.isfinite(total)
    assert float(reg.metrics["consistency_loss"]) > 0
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, key
            assert parameter.grad.dtype == parameter.dtype
            assert torch.isfinite(parameter.grad).all(), key


def test_autocast_around_the_model_only_is_repeated_in_pass_2() -> None:
    """The loss function enters autocast: pass 2 has to run in it as well."""
    model = LLAMA.make().float()

    def loss(m: Any, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return LLAMA.loss(m, batch).float()

    reg = LfURegularizer(model, "steering", alpha=0.0, lam=1.0)
    for _ in range(3):
        reg(model, LLAMA.batch(), loss)
        assert float(reg.metrics["consistency_loss"]) == 0.0


@pytest.mark.parametrize("name", ["steering", "weights"])
def test_float32_gradients_are_close_to_those_in_float64(name: str) -> None:
    found = []
    for dtype in (torch.float64, torch.float32):
        model = LLAMA.make().to(dtype)
        reg = LfURegularizer(model, auxiliary(name), alpha=0.05, lam=0.7)
        reg(model, LLAMA.batch(), LLAMA.loss).backward()
        found.append({key: g.double() for key, g in gradients_of(model).items()})
    assert_same_gradients(found[1], found[0], 1e-3)
