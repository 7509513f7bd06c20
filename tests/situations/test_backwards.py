"""Whose backward is it: gradients that the loss takes itself, functions with their own backward, hooks on tensors."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from lfu_reg import LfURegularizer, LfUWarning
from tests.support.literal import Block, Net, World, assert_equal, assert_exact, assert_plain


class Penalty(World):
    """A gradient penalty on the input."""

    def loss(self, model: Any, batch: Any) -> Tensor:
        x = batch["x"].clone().requires_grad_()
        u = model(x)
        (g,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return (u - batch["y"]).square().mean() + (g.norm(dim=-1) - 1).square().mean()


class HiddenPenalty(World):
    """A gradient penalty on a hidden state that a hook has kept."""

    def begin(self) -> None:
        self.kept: list[Tensor] = []
        self.model.layers[1].register_forward_hook(self.keep)

    def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.kept.append(output)

    def loss(self, model: Any, batch: Any) -> Tensor:
        loss = super().loss(model, batch)
        (g,) = torch.autograd.grad(loss, self.kept.pop(), create_graph=True)
        return loss + g.square().sum()


class WeightPenalty(World):
    """The norm of the loss's own gradient by weights (gradient regularization)."""

    def loss(self, model: Any, batch: Any) -> Tensor:
        loss = super().loss(model, batch)
        g = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        return loss + 0.1 * sum(x.square().sum() for x in g)


class InputAttack(World):
    """FGSM: the input moves along a gradient that is not differentiated."""

    def loss(self, model: Any, batch: Any) -> Tensor:
        x = batch["x"].clone().requires_grad_()
        (g,) = torch.autograd.grad(World.loss(self, model, {**batch, "x": x}), x)
        return World.loss(self, model, {**batch, "x": batch["x"] + 0.1 * g.sign()})


class BackwardInside(InputAttack):
    """The same with `backward`, whose gradients of weights the loss throws away."""

    def loss(self, model: Any, batch: Any) -> Tensor:
        x = batch["x"].clone().requires_grad_()
        World.loss(self, model, {**batch, "x": x}).backward()
        kept = x.grad.sign()
        model.zero_grad()
        return World.loss(self, model, {**batch, "x": batch["x"] + 0.1 * kept})


class WeightAttack(World):
    """Adversarial weight perturbation inside of the loss, in place and taken back."""

    def loss(self, model: Any, batch: Any) -> Tensor:
        weight = model.layers[1].a.weight
        (g,) = torch.autograd.grad(World.loss(self, model, batch), weight)
        model.layers[1].a._parameters["weight"] = weight + 0.1 * g / g.norm()
        try:
            return World.loss(self, model, batch)
        finally:
            model.layers[1].a._parameters["weight"] = weight


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return -0.5 * g


class Reversal(World):
    """A domain head behind a gradient reversal on a hidden state."""

    def begin(self) -> None:
        self.head = nn.Linear(6, 1).double()

    def trained(self) -> dict[str, Tensor]:
        return {**super().trained(), **{f"head.{n}": p for n, p in self.head.named_parameters()}}

    def loss(self, model: Any, batch: Any) -> Tensor:
        kept: list[Tensor] = []
        handle = model.layers[1].register_forward_hook(lambda m, i, o: kept.append(o))
        loss = super().loss(model, batch)
        handle.remove()
        return loss + self.head(Reverse.apply(kept[0])).square().mean()


class ReversalBetween(World):
    """A reversal by a hook on the tensor that goes from one block to the next."""

    def loss(self, model: Any, batch: Any) -> Tensor:
        def reverse(module: nn.Module, args: Any, output: Tensor) -> None:
            output.register_hook(lambda g: -0.3 * g)

        handle = model.layers[1].register_forward_hook(reverse)
        try:
            return super().loss(model, batch)
        finally:
            handle.remove()


class HookOnInput(World):
    """A hook on the input of a block (gradient clipping at activations)."""

    def begin(self) -> None:
        self.model.layers[2].register_forward_pre_hook(self.clip)

    def clip(self, module: nn.Module, args: Any) -> Any:
        h = args[0] * 1
        h.register_hook(lambda g: g.clamp(-0.01, 0.01))
        return (h,)


class HookOnFirstInput(HookOnInput):
    def begin(self) -> None:
        self.model.layers[0].register_forward_pre_hook(self.clip)


class HookInsideFirst(HookOnInput):
    def begin(self) -> None:
        self.model.layers[0].b.register_forward_pre_hook(self.clip)


class FullBackward(World):
    """A module's backward hook scales what goes on."""

    where = "layers.1"

    def begin(self) -> None:
        self.model.get_submodule(self.where).register_full_backward_hook(self.scale)

    def scale(self, module: nn.Module, given: Any, out: Any) -> Any:
        return tuple(None if g is None else 0.5 * g for g in given)


class FullBackwardFirst(FullBackward):
    where = "layers.0"


class FullBackwardInner(FullBackward):
    where = "layers.0.a"


class FullBackwardPre(FullBackward):
    def begin(self) -> None:
        self.model.layers[0].register_full_backward_pre_hook(self.pre)

    def pre(self, module: nn.Module, out: Any) -> Any:
        return tuple(g.clamp(-0.01, 0.01) for g in out)


class BackwardHook(FullBackward):
    """The older kind, which puts no function of its own into the graph."""

    def begin(self) -> None:
        self.model.layers[0].register_backward_hook(self.clip)

    def clip(self, module: nn.Module, given: Any, out: Any) -> Any:
        return tuple(None if g is None else g.clamp(-0.01, 0.01) for g in given)


class ClippingBlock(Block):
    """A block whose backward is not linear."""

    def forward(self, h: Tensor) -> Tensor:
        out = super().forward(h) * 1
        if out.requires_grad:
            out.register_hook(lambda g: g / (g.norm() + 1e-3))
        return out


class NonLinear(World):
    class net(Net):
        block = ClippingBlock


class Clip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.clamp(-0.01, 0.01)


class ClippedFunction(Block):
    def forward(self, h: Tensor) -> Tensor:
        return Clip.apply(super().forward(h))


class NonLinearFunction(World):
    class net(Net):
        block = ClippedFunction


class ClippedEmbedding(World):
    """What lies below the first block clips its gradient."""

    class net(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = Clip.apply(self.inp(x))
            for layer in self.layers:
                h = layer(h)
            return self.out(torch.tanh(h))


class Square(torch.autograd.Function):
    """With a double backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * g


class SquareBlock(Block):
    def forward(self, h: Tensor) -> Tensor:
        return h + self.b(Square.apply(torch.tanh(self.a(h))))


class DoubleBackward(Penalty):
    class net(Net):
        block = SquareBlock


class Retains(World):
    """A hidden state's gradient is looked at after the loss's own backward."""

    def loss(self, model: Any, batch: Any) -> Tensor:
        kept: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            output.retain_grad()
            kept.append(output)

        handle = model.layers[1].register_forward_hook(keep)
        loss = super().loss(model, batch)
        handle.remove()
        loss.backward(retain_graph=True)
        weight = kept[0].grad.abs().mean()
        model.zero_grad()
        return loss * (1 + weight)


class PartialBackward(World):
    """The loss calls `backward` on one part, as chunked losses do, and returns the other."""

    keep = True

    def loss(self, model: Any, batch: Any) -> Tensor:
        model(batch["x"] + 1).square().mean().backward(retain_graph=self.keep)
        return super().loss(model, batch)


class LeafHook(World):
    """A hook on a weight masks what is accumulated, at the caller's backward."""

    def begin(self) -> None:
        mask = torch.ones(6, 6).double()
        mask[0] = 0
        self.model.layers[1].a.weight.register_hook(lambda g: g * mask)


class Figure(World):
    """A gradient of something else is taken on the way, for a figure."""

    def loss(self, model: Any, batch: Any) -> Tensor:
        out = model(batch["x"])
        torch.autograd.grad(out.sum(), model.inp.weight, retain_graph=True)
        return (out - batch["y"]).square().mean()


class Force(World):
    """Forces are gradients by the input, and the loss is of them alone."""

    def loss(self, model: Any, batch: Any) -> Tensor:
        x = batch["x"].clone().requires_grad_()
        (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return (g - batch["y"][:, :3]).square().mean()


class Laplace(World):
    """PINN: second derivatives."""

    def loss(self, model: Any, batch: Any) -> Tensor:
        x = batch["x"].clone().requires_grad_()
        u = model(x).sum(-1)
        (g,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        second = sum(torch.autograd.grad(g[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(3))
        return (second - batch["y"][:, 0]).square().mean() + u.square().mean()


class Tangents(World):
    """Forward-mode derivatives by the input."""

    def loss(self, model: Any, batch: Any) -> Tensor:
        with forward_ad.dual_level():
            pair = forward_ad.unpack_dual(model(forward_ad.make_dual(batch["x"], torch.ones_like(batch["x"]))))
            return (pair.primal - batch["y"]).square().mean() + pair.tangent.square().mean()


SITUATIONS = [
    Tangents, World, Penalty, HiddenPenalty, WeightPenalty, Reversal, ReversalBetween,
    HookOnInput, HookOnFirstInput, HookInsideFirst, FullBackward, FullBackwardFirst, FullBackwardInner,
    FullBackwardPre, BackwardHook, NonLinear, NonLinearFunction, ClippedEmbedding, DoubleBackward, Retains, Figure,
    Force, Laplace,
]  # fmt: skip


@pytest.mark.parametrize("layers", ["all", "late"])
@pytest.mark.parametrize("world", SITUATIONS)
def test_backwards(world: type[World], layers: str) -> None:
    if world is BackwardHook and layers == "all":
        pytest.skip("told: see below")
    kept = world.layers

    def chosen(self: World) -> dict[str, nn.Module]:
        found = kept(self)
        return found if layers == "all" else dict(list(found.items())[-1:])

    late = type(world.__name__, (world,), {"layers": chosen})
    # The first steps compare both terms' gradients, and so take them apart; those that come then do not.
    assert_exact(late, layers="all" if layers == "all" else ["layers.2"], steps=12)


class InnerBackwardHook(BackwardHook):
    def begin(self) -> None:
        self.model.layers[0].a.register_backward_hook(self.clip)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("kind", "world"), [("steering", BackwardHook), ("lora", InnerBackwardHook)])
def test_the_older_kind_of_backward_hook_is_told_with_the_cure(kind: str, world: type[World], full: bool) -> None:
    """What it is called with depends on the forward hooks of its module."""
    ours = FullBackwardInner() if full else world()
    with LfURegularizer(ours.model, kind, alpha=0.01) as reg, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", LfUWarning)
        for step in range(2):
            reg(ours.model, ours.batch(step), ours.loss)
    messages = [str(entry.message) for entry in told if "register_full_backward_hook" in str(entry.message)]
    assert len(messages) == (not full)
    assert full or ("layers.0.a" if kind == "lora" else "layers.0") in messages[0]


class SelfConditioned(World):
    """The model is given what it predicts without gradients, as diffusion models are."""

    def loss(self, model: Any, batch: Any) -> Tensor:
        with torch.no_grad():
            guess = model(batch["x"])
        return super().loss(model, {**batch, "x": batch["x"] + guess[:, :3]})


def test_a_guess_without_gradients_is_of_the_clean_model_unless_weights_are_moved() -> None:
    assert_exact(SelfConditioned, ("steering", "lora"))
    assert_plain(SelfConditioned, "the input of the model's call 2 differs (as it does", ("weights",))


@pytest.mark.parametrize("world", [InputAttack, BackwardInside])
def test_another_input_in_pass_two_is_plain_sft(world: type[World]) -> None:
    for said in ("the input of the model's call 2 differs", "an adversarial example, say, which is to be made before"):
        assert_plain(world, said, ("steering", "lora", "weights"))


@pytest.mark.parametrize("kind", ["steering", "lora", "weights"])
def test_a_backward_inside_of_the_loss_counts_once(kind: str) -> None:
    ours = PartialBackward()
    alone = copy.deepcopy(ours)
    with LfURegularizer(ours.model, kind, alpha=0.1) as reg:
        reg(ours.model, ours.batch(0), ours.loss)
    alone.loss(alone.model, alone.batch(0))
    assert_equal(
        "gradient of", {n: p.grad for n, p in ours.trained().items()}, {n: p.grad for n, p in alone.trained().items()}
    )


@pytest.mark.parametrize("kind", ["steering", "lora"])
def test_a_hidden_state_that_retains_its_gradient_gets_the_sft_losss(kind: str) -> None:
    """Also where the blocks up to it are shared by both passes."""
    ours, kept = World(), []
    plain = copy.deepcopy(ours)

    def loss(model: Any, batch: Any) -> Tensor:
        hidden = model.layers[1](model.layers[0](model.inp(batch["x"])))
        hidden.retain_grad()
        kept.append(hidden)
        return (model.out(model.layers[2](hidden)) - batch["y"]).square().mean()

    with LfURegularizer(ours.model, kind, alpha=0.1, lam=5.0, layers=["layers.2"]) as reg:
        for _ in range(12):
            kept.clear()
            reg(ours.model, ours.batch(0), loss)
    got = kept[0].grad
    kept.clear()
    loss(plain.model, plain.batch(0)).backward()
    assert_equal("gradient", got, kept[0].grad)


class Freed(PartialBackward):
    keep = False


@pytest.mark.parametrize("world", [Freed, WeightAttack])
def test_a_graph_that_the_loss_frees_is_told_with_the_cure(world: type[World]) -> None:
    ours = world()
    with LfURegularizer(ours.model, "steering", alpha=0.1) as reg:
        with pytest.raises(RuntimeError, match="retain_graph=True"):
            reg(ours.model, ours.batch(0), ours.loss)
        assert all(not m._forward_hooks for m in ours.model.modules())


@pytest.mark.parametrize("kind", ["steering", "lora", "weights"])
def test_hooks_on_weights_act_once_on_the_sum(kind: str) -> None:
    ours, plain = LeafHook(), World()
    plain.model.load_state_dict(ours.model.state_dict())
    for world in (ours, plain):
        with LfURegularizer(world.model, kind, alpha=0.1, seed=1) as reg:
            reg(world.model, world.batch(0), world.loss).backward()
    wanted = {n: p.grad for n, p in plain.trained().items()}
    wanted["layers.1.a.weight"][0] = 0
    assert_equal("gradient of", {n: p.grad for n, p in ours.trained().items()}, wanted)


class SkippingBlock(Block):
    def forward(self, h: Tensor, skip: Any = None) -> Any:
        return super().forward(h if skip is None else h + skip), torch.tanh(self.a(h)) * 2


class UnusedSkip(World):
    """What block 0 returns besides goes to block 2, whose output the loss leaves out (an early exit)."""

    class net(Net):
        block = SkippingBlock

        def forward(self, x: Tensor) -> Tensor:
            h, skip = self.layers[0](self.inp(x))
            h, _ = self.layers[1](h)
            self.layers[2](h, skip)
            return self.out(torch.tanh(h))

    def layers(self) -> dict[str, nn.Module]:
        return {n: m for n, m in super().layers().items() if n != "layers.0"}


def test_a_second_tensor_of_a_block_that_the_loss_does_not_use() -> None:
    assert_exact(UnusedSkip, ("steering", "lora"), layers=["layers.1", "layers.2"])
