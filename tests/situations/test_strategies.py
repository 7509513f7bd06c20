"""Situations in which strategies differ: whose backward it is, when it runs, and what lam it has."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lfu_reg import LfURegularizer, LfUWarning
from tests.support import literal
from tests.support.literal import ALPHA, LAM, Block, Net, World, assert_equal, assert_exact, forward, literal_step

KINDS = ("steering", "lora", "weights")


class ClippedBetween(World):
    """Hooks on tensors clip the gradient at each layer."""

    class net(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = self.inp(x)
            for layer in self.layers:
                h = layer(h)
                h.register_hook(lambda g: g.clamp(-0.02, 0.02))
            return self.out(h)


class ClippedByModules(World):
    """Backward hooks of modules do."""

    def begin(self) -> None:
        for layer in self.model.layers:
            layer.register_full_backward_hook(lambda module, down, up: (down[0].clamp(-0.01, 0.01),))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [ClippedBetween, ClippedByModules])
def test_hooks_see_the_weighted_term_where_strength_sets_lam(
    world: type[World], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = world()
    with LfURegularizer(ours.model, kind, strength=1.0, alpha=ALPHA, seed=1) as reg:
        reg(ours.model, ours.batch(0), ours.loss).backward()
        monkeypatch.setattr(literal, "LAM", float(reg.metrics["lam"]))
        a = {n: v[0] for n, v in reg.perturbation.items()} if kind == "lora" else None
    gradients = {n: p.grad for n, p in ours.trained().items()}
    assert_equal("gradient of", gradients, literal_step(ours, ours.batch(0), kind, 0, a).gradients)


class Normalised(World):
    """The forward writes to a trained weight, every time."""

    class net(Net):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.out.weight.div_(self.out.weight.norm(dim=1, keepdim=True))
            return super().forward(x)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_the_forward_writes_to(kind: str) -> None:
    """A retained graph has saved them, and what the second pass writes is too late for one ordinary backward."""
    ours = Normalised()
    given = {"alpha": ALPHA, "lam": LAM}
    with (
        LfURegularizer(ours.model, kind, strategy="retained", **given) as reg,
        pytest.raises(RuntimeError, match="writes to trained weights does not go with a graph that is retained"),
    ):
        reg(ours.model, ours.batch(0), ours.loss)
    assert_one_backward(Normalised, kind)


class RunsAgain(torch.autograd.Function):
    """A checkpoint as people write it themselves."""

    @staticmethod
    def forward(ctx: Any, module: nn.Module, x: Tensor, *weights: Tensor) -> Any:
        ctx.module = module
        ctx.save_for_backward(x)
        return module(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.module(x)
        return None, *torch.autograd.grad(y, [x, *ctx.module.parameters()], gradient)


class Reversible(World):
    class net(Net):
        def __init__(self) -> None:
            super().__init__()
            self.stem = Block()

        def forward(self, x: Tensor) -> Tensor:
            h = RunsAgain.apply(self.stem, self.inp(x), *self.stem.parameters())
            for layer in self.layers:
                h = layer(h)
            return self.out(h)


class ByHand(torch.autograd.Function):
    """A linear map that keeps its weight where it likes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Any:
        ctx.save_for_backward(x)
        ctx.kept = (weight.detach(),)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient @ ctx.kept[0], gradient.t() @ ctx.saved_tensors[0]


class KeepsWeights(World):
    class net(Net):
        class block(Block):
            def forward(self, h: Tensor) -> Tensor:
                return h + self.b(torch.tanh(ByHand.apply(h, self.a.weight)))


@pytest.mark.parametrize("world", [Reversible, KeepsWeights])
def test_functions_that_run_modules_again(world: type[World]) -> None:
    """In the caller's backward the weights are not moved any more."""
    assert_exact(world, KINDS)
    assert_exact(world, ("steering", "lora"), strategy="retained")
    ours = world()
    with (
        LfURegularizer(ours.model, "weights", alpha=ALPHA, lam=LAM, strategy="retained") as reg,
        pytest.raises(RuntimeError, match="does not go with a graph that is retained"),
    ):
        reg(ours.model, ours.batch(0), ours.loss)


class Accumulates(torch.autograd.Function):
    """As fused kernels do that write to a buffer of gradients: none is given back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Any:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient @ ctx.saved_tensors[1], None


class Fused(World):
    class net(Net):
        class block(Block):
            def forward(self, h: Tensor) -> Tensor:
                return h + self.b(torch.tanh(Accumulates.apply(h, self.a.weight)))


def test_functions_that_give_no_gradient() -> None:
    assert_exact(Fused, ("steering", "weights"))
    ours = Fused()
    with LfURegularizer(ours.model, "weights", alpha=ALPHA, lam=LAM, strategy="one-backward") as reg:
        for step in range(2):
            reg(ours.model, ours.batch(step), ours.loss).backward()
        assert reg.metrics["consistency_loss"] > 0
        assert not reg.perturbation["layers.1.a.weight"].any()


class Balanced(World):
    """Two tasks are weighed by the gradients that they have."""

    def loss(self, model: Any, batch: Any) -> Tensor:
        out = model(batch["x"])
        tasks = (out[:, :2] - batch["y"][:, :2]).square().mean(), (out[:, 2:] - batch["y"][:, 2:]).abs().mean()
        weights = [model.layers[2].b.weight]
        lengths = [torch.autograd.grad(task, weights, retain_graph=True)[0].norm() for task in tasks]
        return tasks[0] / lengths[0] + tasks[1] / lengths[1]


class Transformed(World):
    """What the model returns goes through a derivative that torch.func takes."""

    def loss(self, model: Any, batch: Any) -> Tensor:
        cubes = torch.func.vmap(torch.func.grad(lambda row: row.pow(3).sum()))(model(batch["x"]))
        return (cubes - batch["y"]).square().mean()  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [Balanced, Transformed])
def test_gradients_in_the_loss_with_one_backward(world: type[World], kind: str) -> None:
    assert_exact(world, [kind])
    assert_one_backward(world, kind)


def assert_one_backward(world: type[World], kind: str) -> None:
    """The second step's gradient is that of the loss and of what its clean states carry."""
    ours = world()
    plain = copy.deepcopy(ours)
    with LfURegularizer(ours.model, kind, alpha=ALPHA, lam=LAM, seed=1, strategy="one-backward") as reg:
        reg(ours.model, ours.batch(0), ours.loss).backward()
        ours.model.zero_grad()
        reg(ours.model, ours.batch(1), ours.loss).backward()
        assert reg.metrics["consistency_loss"] > 0
        perturbation = reg.perturbation
    leaves = list(plain.trained().values())
    first = torch.autograd.grad(plain.loss(plain.model, plain.batch(1)), leaves, allow_unused=True)
    states, moved = clean_and_perturbed(plain, plain.batch(1), kind, perturbation)
    pairs = zip(states, moved, strict=True)
    carried = sum((2 * LAM / len(states) / h.numel() * (m - h).detach() * h).sum() for h, m in pairs)
    second = torch.autograd.grad(carried, leaves, allow_unused=True)
    both = {
        name: (0 if one is None else one) + (0 if other is None else other)
        for name, one, other in zip(plain.trained(), first, second, strict=True)
    }
    assert_equal("gradient of", {n: p.grad for n, p in ours.trained().items()}, both)


def clean_and_perturbed(world: World, batch: Any, kind: str, moved: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of the layers, with the graph and with the components in place."""

    def edit(name: str, x: Tensor, y: Tensor) -> Tensor:
        component = moved[name]
        if kind == "steering":
            return y + (component[0] if isinstance(component, tuple) else component)  # type: ignore[no-any-return]
        return y + literal.SCALE * (x @ component[0].T) @ component[1].T  # type: ignore[no-any-return]

    other = copy.deepcopy(world)
    for name, delta in moved.items() if kind == "weights" else ():
        other.own()[name].data += delta
    _, clean, handles = forward(world, batch, 0, (), None)
    _, perturbed, others = forward(other, batch, 0, () if kind == "weights" else moved, edit)
    for handle in handles + others:
        handle.remove()
    return [h for _, h in clean], [h for _, h in perturbed]


@pytest.mark.parametrize("strategy", ["released", "retained"])
def test_nothing_trained_before_the_layers(strategy: str) -> None:
    ours = World()
    ours.model.requires_grad_(False)
    ours.model.out.requires_grad_(True)
    plain = copy.deepcopy(ours)
    with LfURegularizer(ours.model, "steering", strategy=strategy) as reg:
        with pytest.warns(LfUWarning, match="The consistency term has no gradient"):
            reg(ours.model, ours.batch(0), ours.loss).backward()
        assert float(reg.metrics["gradient_ratio"]) == 0
    plain.loss(plain.model, plain.batch(0)).backward()
    gradients = {n: p.grad for n, p in plain.trained().items()}
    assert_equal("gradient of", {n: p.grad for n, p in ours.trained().items()}, gradients)
