"""The weights as auxiliary components: moved for whoever reads them, leaves still, and untouched afterwards."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfu_reg import LfURegularizer
from tests.support.literal import Net, World, assert_exact


class Holding(World):
    """The loss function has a weight of its own reach, and passes the module that holds it by."""

    def begin(self) -> None:
        self.weight = self.model.inp.weight

    def loss(self, model: Any, batch: Any) -> Tensor:
        h = F.linear(batch["x"], self.weight)
        for layer in model.layers:
            h = layer(h)
        return model.out(h).square().mean()


class Freezing(World):
    """Some blocks are frozen while the loss is computed, as one of two players is."""

    def loss(self, model: Any, batch: Any) -> Tensor:
        loss = super().loss(model, batch)
        model.layers[1].requires_grad_(False)
        loss = loss + super().loss(model, batch)
        model.layers[1].requires_grad_(True)
        return loss


class Copying(World):
    """A copy of the model, as it is in this call, is the teacher."""

    def loss(self, model: Any, batch: Any) -> Tensor:
        teacher = copy.deepcopy(model).requires_grad_(False)
        with torch.no_grad():
            taught = teacher(-batch["x"])
        return super().loss(model, batch) + (model(batch["x"]) - taught).square().mean()


@pytest.mark.parametrize("strategy", ["released", "retained"])
@pytest.mark.parametrize("world", [Holding, Freezing, Copying])
def test_weights_are_moved_for_everybody(world: type[World], strategy: str) -> None:
    assert_exact(world, ["weights"], strategy=strategy)


def test_casts_of_autocast_around_the_step_are_not_mistaken_for_moved_weights() -> None:
    def gradients(*, around: bool) -> list[Tensor | None]:
        torch.manual_seed(0)
        model, x = Net(), torch.randn(5, 3)

        def loss(m: nn.Module, b: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return m(b).float().square().mean()

        reg = LfURegularizer(model, "weights", alpha=0.5, lam=3.0)
        with torch.autocast("cpu", torch.bfloat16) if around else contextlib.nullcontext():  # which keeps its casts
            before = loss(model, x).detach()
            total = reg(model, x, loss)
            assert torch.equal(loss(model, x).detach(), before)
        total.backward()
        return [p.grad for p in model.parameters()]

    torch.testing.assert_close(gradients(around=True), gradients(around=False), rtol=0, atol=0)


def test_graphs_that_the_caller_has_made_before_go_on() -> None:
    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(5, 3, dtype=torch.float64)
    other = model(-x).square().sum()
    wanted = torch.autograd.grad(other, list(model.parameters()), retain_graph=True)
    before = [p.detach().clone() for p in model.parameters()]
    LfURegularizer(model, "weights", alpha=0.5, lam=1.0)(model, x, lambda m, b: m(b).square().mean())
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    torch.testing.assert_close(torch.autograd.grad(other, list(model.parameters())), wanted, rtol=0, atol=0)


class Positions(nn.Module):
    """A table of positions, whose output is a part of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(9, 6))

    def forward(self, count: int) -> Tensor:
        return self.table[:count]


class WithPositions(World):
    class net(Net):
        def __init__(self) -> None:
            super().__init__()
            self.positions = Positions()

        def forward(self, x: Tensor) -> Tensor:
            h = self.inp(x) + self.positions(len(x))
            for layer in self.layers:
                h = layer(h)
            return self.out(h)

    def layers(self) -> dict[str, nn.Module]:
        return {"positions": self.model.positions, "layers.1": self.model.layers[1]}


@pytest.mark.parametrize("strategy", ["released", "retained"])
def test_states_that_are_weights_stay_where_they_were(strategy: str) -> None:
    assert_exact(WithPositions, ["weights"], steps=3, layers=["positions", "layers.1"], strategy=strategy)


class Offloaded(World):
    def loss(self, model: Any, batch: Any) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return super().loss(model, batch)


def test_hooks_on_what_is_saved_come_after_the_copies() -> None:
    enter = torch.autograd.graph.saved_tensors_hooks.__enter__
    assert_exact(Offloaded, ["weights"], strategy="retained")
    assert torch.autograd.graph.saved_tensors_hooks.__enter__ is enter


def test_weights_that_other_processes_see_are_refused() -> None:
    model = Net()
    model.out.weight.share_memory_()
    with pytest.raises(ValueError, match=r"shared with other processes.*deepcopy"):
        LfURegularizer(model, "weights")
    LfURegularizer(copy.deepcopy(model), "weights")
