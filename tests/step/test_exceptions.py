"""An exception at any point of a step leaves everything as it was, and the next step is right."""

from __future__ import annotations

import copy
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from lfu_reg import LfURegularizer
from tests.support.cases import seeded
from tests.support.harness import auxiliary
from tests.support.models import TINY
from tests.support.plain_models import TinyLM
from tests.support.snapshots import Snapshot, buffers_of, differing

AUXILIARIES = ("lora", "steering", "weights", "random")
STRATEGIES = ("released", "retained")
DEPTH = 3


class Boom(RuntimeError):
    pass


@dataclass
class Fuse:
    """Raises `error` when it has been passed `left` more times."""

    left: int = 10**9
    error: type[BaseException] = Boom
    burnt: bool = False

    def __call__(self) -> None:
        if self.left == 0:
            self.burnt = True
            raise self.error("injected")
        self.left -= 1


FUSES: dict[str, Fuse] = {}


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        FUSES["backward"]()
        return grad


class Bomb(nn.Module):
    """Wraps a part of a block: goes off in the forward or in the backward."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> Tensor:
        FUSES["forward"]()
        return _Backward.apply(self.inner(hidden))


def armed_model() -> TinyLM:
    def make() -> TinyLM:
        model = TinyLM(dropout=0.3, batch_norm=True, depth=DEPTH)
        for block in model.blocks:
            block.norm = Bomb(block.norm)
        return model

    return seeded(make)


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    FUSES["before model"]()
    loss = TINY.loss(model, batch)
    FUSES["after model"]()
    return loss


def distance(clean: Tensor, perturbed: Tensor) -> Tensor:
    FUSES["distance"]()
    return (perturbed - clean).square().mean()


def schedule(value: float, fuse: str) -> Any:
    def at(step: int) -> float:
        FUSES[fuse]()
        return value

    return at


def token_mask(batch: Any) -> Tensor:
    FUSES["token_mask"]()
    return batch["labels"] != -100


POINTS = ("before model", "after model", "forward", "backward", "distance", "alpha", "lam", "token_mask")


def fresh_fuses() -> None:
    FUSES.update({point: Fuse() for point in POINTS})


def make_reg(model: nn.Module, name: str, strategy: str, steps: int) -> LfURegularizer:
    aux = name if name == "random" else auxiliary(name)
    return LfURegularizer(
        model,
        aux,
        alpha=schedule(0.05, "alpha"),
        lam=schedule(0.7, "lam"),
        distance=distance,
        token_mask=token_mask,
        strategy=strategy,
        ascent_steps=steps,
        seed=3,
    )


@dataclass
class World:
    """Random state and buffers before a step, and after the plain SFT step that goes wrong at the same point."""

    states: list[Tensor] = field(default_factory=list)
    buffers: list[dict[str, Tensor]] = field(default_factory=list)

    def add(self, model: nn.Module) -> None:
        self.states.append(torch.get_rng_state())
        self.buffers.append(buffers_of(model))

    def check(self, model: nn.Module) -> None:
        state = torch.get_rng_state()
        assert any(torch.equal(state, known) for known in self.states), "random state is neither"
        assert any(not differing(buffers_of(model), known) for known in self.buffers), "buffers are neither"


@given(
    point=st.sampled_from(POINTS),
    count=st.integers(0, 4 * DEPTH),
    name=st.sampled_from(AUXILIARIES),
    strategy=st.sampled_from(STRATEGIES),
    steps=st.integers(1, 2),
    interrupt=st.booleans(),
    had_gradients=st.booleans(),
)
@example("forward", DEPTH + 1, "weights", "released", 1, True, True)
@example("forward", DEPTH + 1, "weights", "retained", 1, False, True)
@example("distance", 1, "weights", "released", 1, False, True)
@example("backward", 1, "weights", "released", 1, False, True)
@example("forward", DEPTH + 1, "lora", "released", 2, False, False)
@example("backward", DEPTH + 1, "steering", "released", 2, False, False)
def test_an_exception_anywhere(
    point: str,
    count: int,
    name: str,
    strategy: str,
    steps: int,
    interrupt: bool,
    had_gradients: bool,
) -> None:
    error: type[BaseException] = KeyboardInterrupt if interrupt else Boom
    fresh_fuses()
    model = armed_model()
    if had_gradients:
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
    clean = Snapshot.of(model)
    reg = make_reg(model, name, strategy, steps)
    attached = Snapshot.of(model)

    # What plain SFT would leave behind when the same thing goes wrong.
    world, plain = World(), armed_model()
    torch.manual_seed(8)
    world.add(plain)
    FUSES[point] = Fuse(count, error)
    with suppress(Boom, KeyboardInterrupt):
        loss_fn(plain, TINY.batch())
    world.add(plain)

    fresh_fuses()
    FUSES[point] = Fuse(count, error)
    torch.manual_seed(8)
    batch = TINY.batch()
    with suppress(error):
        reg(model, batch, loss_fn)
    assert batch.keys() == TINY.batch().keys()
    attached.check(model)
    world.check(model)
    assert not reg._attached.hooks.listening

    # Outside of a step the model gives what a copy without live hooks gives, also with gradients enabled.
    fresh_fuses()
    twin = copy.deepcopy(model)
    torch.manual_seed(9)
    plain_loss = loss_fn(twin, TINY.batch()).detach()
    torch.manual_seed(9)
    assert torch.equal(loss_fn(model, TINY.batch()).detach(), plain_loss)

    # The next step is as good as that of a new regularizer.
    fresh_fuses()
    torch.manual_seed(9)
    if name in ("steering", "weights"):
        with make_reg(twin, name, strategy, steps) as other:
            expected = other(twin, TINY.batch(), loss_fn).detach()
        torch.manual_seed(9)
        assert torch.equal(reg(model, TINY.batch(), loss_fn).detach(), expected)
    reg.remove()
    clean.check(model)


@pytest.mark.parametrize("name", AUXILIARIES)
def test_an_exception_in_the_users_backward(name: str) -> None:
    """With the retained strategy the backward through both passes is the user's, after the step has returned."""
    fresh_fuses()
    model = armed_model()
    clean = Snapshot.of(model)
    reg = make_reg(model, name, "retained", 1)
    loss = reg(model, TINY.batch(), loss_fn)
    FUSES["backward"] = Fuse(0)
    with pytest.raises(Boom):
        loss.backward()
    fresh_fuses()
    del loss
    reg(model, TINY.batch(), loss_fn).backward()
    reg.remove()
    clean.check(model, gradients=False)


def test_an_abandoned_loss_holds_nothing_up() -> None:
    fresh_fuses()
    model = armed_model()
    reg = make_reg(model, "weights", "released", 1)
    for _ in range(3):
        reg(model, TINY.batch(), loss_fn)  # never backpropagated
    before = Snapshot.of(model)
    before.check(model)
    reg(model, TINY.batch(), loss_fn).backward()
    assert all(p.grad is not None for p in model.parameters())
