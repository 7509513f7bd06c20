"""What models are made of: programs of TorchScript, weights with notes, modules and shapes that a forward makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lfu_reg import LfURegularizer, LfUWarning
from tests.support.literal import ALPHA, LAM, Block, Net, World, assert_equal, assert_exact

KINDS = ("steering", "lora", "weights")


class Scripted(World):
    """Statistics that TorchScript keeps, and reads in the same forward."""

    class net(Net):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.jit.script(nn.BatchNorm1d(6))
            self.out = torch.jit.script(self.out)

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(self.layers[1](self.layers[0](self.inp(x))))
            return self.out(self.layers[2](h + self.norm.running_mean))  # type: ignore[no-any-return]


def test_scripts_beside_the_layers() -> None:
    assert_exact(Scripted, KINDS, steps=3)


class Noted(World):
    """A weight has an attribute that its layer reads."""

    class net(Net):
        class block(Block):
            def forward(self, h: Tensor) -> Tensor:
                return h + getattr(self.a.weight, "scale", 1.0) * self.b(torch.tanh(self.a(h)))

    def begin(self) -> None:
        for layer in self.model.layers:
            layer.a.weight.scale = 1.0


def test_attributes_of_weights() -> None:
    noted = Noted()
    noted.model.layers[1].a.weight.scale = 2.0
    plain = World()
    plain.model.load_state_dict(noted.model.state_dict())
    with torch.no_grad():
        plain.model.layers[1].b.weight *= 2
        plain.model.layers[1].b.bias *= 2
    states: list[Tensor] = []
    noted.model.layers[1].register_forward_hook(lambda module, args, output: states.append(output.detach()))

    class Strict(Block):  # no default: what is moved has the attribute as well
        def forward(self, h: Tensor) -> Tensor:
            return h + self.a.weight.scale * self.b(torch.tanh(self.a(h)))  # type: ignore[operator]

    noted.model.layers[1].__class__ = Strict
    with LfURegularizer(noted.model, "weights", alpha=ALPHA, lam=LAM) as reg:
        reg(noted.model, noted.batch(0), noted.loss)
        delta = reg.perturbation
        clean, moved = states
        h = noted.model.layers[0](noted.model.inp(noted.batch(0)["x"]))
        assert_equal("clean", clean, plain.model.layers[1](h).detach())
    with torch.no_grad():
        for name, weight in noted.model.named_parameters():
            weight += delta[name]
        noted.model(noted.batch(0)["x"])
    assert_equal("perturbed", moved, states[-1])


class Made(World):
    """A module, or a weight, that the first forward makes."""

    weight = False

    class net(Net):
        weight = False

        def __init__(self) -> None:
            super().__init__()
            self.norm: Any = None

        def forward(self, x: Tensor) -> Tensor:
            h = self.layers[1](self.layers[0](self.inp(x)))
            if self.norm is None:
                self.norm = nn.Parameter(torch.ones(6).double()) if self.weight else nn.LayerNorm(6).double()
            return self.out(self.layers[2](self.norm * h if self.weight else self.norm(h)))

    def begin(self) -> None:
        self.model.weight = self.weight


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight", [False, True])
def test_what_a_forward_makes_is_told_and_kept(weight: bool, kind: str) -> None:
    """Another one would be made in pass 2, and stay in its place."""
    ours = type("MadeHere", (Made,), {"weight": weight})()
    kept: list[Any] = []

    def loss(model: Any, batch: Any) -> Tensor:
        value = ours.loss(model, batch)
        kept.append(model.norm)
        return value

    with LfURegularizer(ours.model, kind, alpha=ALPHA, lam=LAM) as reg:
        with pytest.warns(LfUWarning, match="wrote to net, where it made modules or parameters"):
            reg(ours.model, ours.batch(0), loss).backward()
        assert len(kept) == 1
        assert ours.model.norm is kept[0]
        assert all(p.grad is not None for p in ours.model.parameters())
        reg(ours.model, ours.batch(1), loss)
        assert float(reg.metrics["consistency_loss"]) > 0


def test_weights_without_a_shape_are_refused() -> None:
    ours = World()
    ours.model.layers[1].a = nn.LazyLinear(6).double()
    with LfURegularizer(ours.model, "steering") as reg:
        with pytest.raises(ValueError, match=r"have no shape yet.*layers\.1\.a\.weight.*Run the model once"):
            reg(ours.model, ours.batch(0), ours.loss)
        with torch.no_grad():
            ours.model(ours.batch(0)["x"])
        reg(ours.model, ours.batch(0), ours.loss)


def nested(rows: Tensor) -> Tensor:
    return torch.nested.nested_tensor([rows[:2], rows[2:]], layout=torch.jagged)


class NestedInput(World):
    """Packed before the first layer."""

    class net(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.values())

    def batch(self, step: int) -> Any:
        batch = super().batch(step)
        return {**batch, "x": nested(batch["x"])}


def test_nested_inputs() -> None:
    assert_exact(NestedInput, KINDS)
