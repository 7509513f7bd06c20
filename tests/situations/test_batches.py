"""Batches of any kind, and what loss functions do to them: rebound, popped, cached in, and written to in place."""

from __future__ import annotations

import logging
from collections import UserDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lfu_reg import LfURegularizer
from lfu_reg.step.sft_loss import copied
from tests.support.literal import ALPHA, LAM, Block, Net, World, assert_equal, assert_exact


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@dataclass(frozen=True, slots=True)
class Frozen:
    x: Tensor
    y: Tensor


class Slots:
    __slots__ = ("seen", "x", "y")

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y, self.seen = x, y, [0]


class Table:
    """A mapping by its methods alone, as tensordict has it."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.kept = {"x": x, "y": y}

    def __getitem__(self, key: str) -> Any:
        return self.kept[key]


def of_pair(model: Any, b: Any) -> Tensor:
    b.x.sub_(0.3).div_(2)
    b.y.add_(1)
    return (model(b.x) - b.y).square().mean()


def of_slots(model: Any, b: Any) -> Tensor:
    b.x = b.x * 2
    b.seen.append(1)
    b.y.add_(1)
    return (model(b.x * len(b.seen)) - b.y).square().mean()


def of_table(model: Any, b: Any) -> Tensor:
    b.kept["x"] = b["x"] * 2
    b["y"].add_(1)
    return (model(b["x"]) - b["y"]).square().mean()


def of_user_dict(model: Any, b: Any) -> Tensor:
    x = b.pop("x").mul_(2)
    b.setdefault("noise", torch.randn(5, 3).double())
    return (model(x + b["noise"]) - b["y"]).square().mean()


def of_iterator(model: Any, b: Iterator[Any]) -> Tensor:
    return of_pair(model, next(b)) + of_pair(model, next(b))


KINDS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any, Any], Tensor]]] = {
    "named tuple": (Pair, of_pair),
    "frozen dataclass with slots": (Frozen, of_pair),
    "slots": (Slots, of_slots),
    "dictionary in an object": (Table, of_table),
    "UserDict": (lambda x, y: UserDict(x=x, y=y), of_user_dict),
    "iterator": (lambda x, y: iter([Pair(x, y), Pair(x + 1, y + 1)]), of_iterator),
}


@pytest.mark.parametrize("kind", KINDS)
def test_batches(kind: str) -> None:
    make, loss = KINDS[kind]

    class OfKind(World):
        def batch(self, step: int) -> Any:
            b = super().batch(step)
            return make(b["x"], b["y"])

        def loss(self, model: Any, batch: Any) -> Tensor:
            return loss(model, batch)

    # With the last layer alone, the blocks below are differentiated after pass 2, and need what they have saved.
    late = type("Late", (OfKind,), {"layers": lambda self: {"layers.2": self.model.layers[2]}})
    assert_exact(late, ("steering", "weights"), layers=["layers.2"])
    if kind != "iterator":
        ours = OfKind()
        given, plain = ours.batch(0), ours.batch(0)
        torch.manual_seed(0)
        with LfURegularizer(ours.model, "steering", alpha=ALPHA, lam=LAM) as reg:
            reg(ours.model, given, ours.loss)
        torch.manual_seed(0)
        ours.loss(ours.model, plain)
        assert_equal("the batch", *(held_by(b) for b in (given, plain)))


def held_by(batch: Any) -> Any:
    if isinstance(batch, Pair):
        return batch._asdict()
    names = ("x", "y") if isinstance(batch, Frozen) else Slots.__slots__ if isinstance(batch, Slots) else ()
    return {name: getattr(batch, name) for name in names} or dict(getattr(batch, "kept", None) or batch)


class Modulated(Net):
    """Blocks are called with a generator, or with a module that counts in its statistics."""

    class block(Block):
        def forward(self, h: Tensor, given: Any) -> Tensor:
            if isinstance(given, nn.Module):
                given(h.detach())
                return super().forward(h - given.running_mean)
            return super().forward(h * torch.as_tensor(given.random(h.shape)))

    def forward(self, x: Tensor, given: Any) -> Tensor:
        h = self.inp(x)
        for layer in self.layers:
            h = layer(h, given)
        return self.out(torch.tanh(h))


class OfTwo(World):
    net = Modulated

    def loss(self, model: Any, batch: Any) -> Tensor:
        return (model(batch.x, batch.given) - batch.y).square().mean()


class WithGenerator(OfTwo):
    def batch(self, step: int) -> Any:
        return SimpleNamespace(**super().batch(step), given=np.random.default_rng(step))


class WithModule(OfTwo):
    def batch(self, step: int) -> Any:
        return SimpleNamespace(**super().batch(step), given=nn.BatchNorm1d(6).double().requires_grad_(False))


@pytest.mark.parametrize("world", [WithGenerator, WithModule])
def test_what_a_batch_brings_is_put_back(world: type[World]) -> None:
    assert_exact(world, steps=1 if world is WithModule else 2)


class HoldsItself(World):
    """As objects with a parent do."""

    def batch(self, step: int) -> Any:
        batch = super().batch(step)
        batch["self"], batch["list"] = batch, [batch, batch]
        return batch

    def loss(self, model: Any, batch: Any) -> Tensor:
        same = batch["list"][1]
        same["x"] = same["x"] * 2
        return (model(same["self"]["x"]) - batch["y"]).square().mean()


class ThereTwice(World):
    """One tensor under two names is written to under one."""

    def batch(self, step: int) -> Any:
        batch = super().batch(step)
        return {**batch, "again": batch["x"]}

    def loss(self, model: Any, batch: Any) -> Tensor:
        batch["x"].add_(1)
        return (model(batch["again"]) - batch["y"]).square().mean()


@pytest.mark.parametrize("world", [HoldsItself, ThereTwice])
def test_what_a_batch_holds_twice(world: type[World]) -> None:
    assert_exact(world)


class MadeOnAccess(UserDict):  # type: ignore[type-arg]
    """As memory-mapped rows are."""

    def __getitem__(self, key: str) -> list[Any]:
        return [self.data[key]]


def test_objects_that_a_mapping_makes_are_told_apart() -> None:
    rows = MadeOnAccess()
    rows.data = {name: torch.tensor(value) for name, value in (("y", 1.0), ("x", 2.0), ("z", 3.0))}
    assert copied(rows).data == {name: [value] for name, value in rows.data.items()}


@pytest.mark.parametrize("of_its_own", [True, False])
def test_samples_of_an_object_in_an_object(of_its_own: bool) -> None:
    ours = World()
    batch = SimpleNamespace(inner=SimpleNamespace(**ours.batch(0)), log=logging.getLogger("of.a.batch"))
    handlers = batch.log.handlers
    if of_its_own:
        batch.x = batch.inner.x
    with LfURegularizer(ours.model, "steering", batch_fraction=0.5) as reg:
        reg(ours.model, batch, lambda m, b: ours.loss(m, vars(b.inner))).backward()
        assert float(reg.metrics["consistency_loss"]) > 0
    assert (len(batch.inner.x), len(batch.inner.y)) == (5, 5)
    assert batch.log.handlers is handlers
