"""Other people's machinery around the step: closures, scalers, copies, compilers, exceptions, cleared hooks."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lfu_reg import LfURegularizer
from tests.support.literal import ALPHA, LAM, Block, Net, World, assert_equal, assert_exact, seed_everything

KINDS = ("steering", "lora", "weights")


def copied(world: World, step: int) -> None:
    """An LR finder copies the model in the middle, and goes back to the copy's values."""
    spare = copy.deepcopy(world.model)
    world.model(torch.randn(2, 3).double())
    world.model.load_state_dict(spare.state_dict())


def pickled(world: World, step: int) -> None:
    pickle.loads(pickle.dumps(world.model))
    torch.save(world.model, io.BytesIO())


def scripted(world: World, step: int) -> None:
    torch.jit.script(world.model.layers[0])
    torch.jit.trace(world.model, torch.randn(2, 3).double())


def exported(world: World, step: int) -> None:
    torch.export.export(world.model, (torch.randn(2, 3).double(),))


def cleared(world: World, step: int) -> None:
    for module in world.model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        module._backward_hooks.clear()


def evaluated(world: World, step: int) -> None:
    world.model.eval()
    with torch.inference_mode():
        world.model(torch.randn(2, 3).double())
    world.model.train()


def moved(world: World, step: int) -> None:
    """To another dtype and back, in place."""
    world.model.to(torch.float64)
    for weight in world.model.parameters():
        weight.data = weight.data.clone()


def replaced(world: World, step: int) -> None:
    """A block is replaced by a copy of itself."""
    world.model.layers[1] = copy.deepcopy(world.model.layers[1])


def collected(world: World, step: int) -> None:
    gc.collect()


@pytest.mark.parametrize("layers", ["all", "late"])
@pytest.mark.parametrize(
    "between", [copied, pickled, scripted, exported, cleared, evaluated, moved, replaced, collected]
)
def test_between_steps(between: Any, layers: str) -> None:
    assert_exact(World if layers == "all" else Late, between=between, layers="all" if layers == "all" else ["layers.2"])


class Late(World):
    def layers(self) -> dict[str, nn.Module]:
        return {"layers.2": self.model.layers[2]}


class Tied(World):
    """Two blocks share a weight, and one of them is run twice."""

    class net(Net):
        def __init__(self) -> None:
            super().__init__()
            self.layers[2].a.weight = self.layers[0].a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.layers[1](self.layers[2](self.layers[1](self.layers[0](self.inp(x))))))


class TiedEmbedding(World):
    class net(Net):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(6, 3)
            del self.out.weight
            self.out.weight = self.inp.weight
            self.out.forward = self.project  # type: ignore[method-assign]

        def project(self, h: Tensor) -> Tensor:
            return nn.functional.linear(h, self.inp.weight.T)

        def forward(self, x: Tensor) -> Tensor:
            h = self.inp(x)
            for layer in self.layers:
                h = layer(h)
            return self.project(h)

    def loss(self, model: Any, batch: Any) -> Tensor:
        return (model(batch["x"]) - batch["y"][:, :3]).square().mean()


class Tupled(World):
    class Pair(Block):
        def forward(self, h: Tensor) -> Any:
            return super().forward(h), h.mean()

    class net(Net):
        def forward(self, x: Tensor) -> Tensor:
            h, extra = self.inp(x), 0.0
            for layer in self.layers:
                h, more = layer(h)
                extra = extra + more
            return self.out(h) + extra


Tupled.net.block = Tupled.Pair


class Keyword(World):
    """Blocks are called with keywords only."""

    class Named(Block):
        def forward(self, *, hidden_states: Tensor, scale: float = 1.0) -> Tensor:
            return super().forward(hidden_states) * scale

    class net(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = self.inp(x)
            for layer in self.layers:
                h = layer(hidden_states=h, scale=1.1)
            return self.out(h)


Keyword.net.block = Keyword.Named


@dataclass
class Output:
    prediction: Tensor
    hidden: list[Tensor]


class Returned(World):
    """The model returns a dataclass with a list of hidden states, or yields them."""

    class net(Net):
        def forward(self, x: Tensor) -> Any:
            h, hidden = self.inp(x), []
            for layer in self.layers:
                h = layer(h)
                hidden.append(h)
            return Output(self.out(h), hidden)

    def loss(self, model: Any, batch: Any) -> Tensor:
        out = model(batch["x"])
        return (out.prediction - batch["y"]).square().mean() + sum(h.square().mean() for h in out.hidden)


class Generated(Returned):
    class net(Net):
        def forward(self, x: Tensor) -> Any:
            h = self.inp(x)
            for layer in self.layers:
                h = layer(h)
                yield h
            yield self.out(h)

    def loss(self, model: Any, batch: Any) -> Tensor:
        *hidden, prediction = model(batch["x"])
        return (prediction - batch["y"]).square().mean() + sum(h.square().mean() for h in hidden)


class Compiled(World):
    """The loss is compiled, but not the model."""

    def loss(self, model: Any, batch: Any) -> Tensor:
        measure = torch.compile(lambda p, y: (p - y).square().mean(), backend="eager")
        return measure(model(batch["x"]), batch["y"])


class Retries(World):
    """Out of memory at the first try: half of the batch, twice."""

    def begin(self) -> None:
        self.model.register_forward_pre_hook(self.fail)

    def fail(self, module: nn.Module, args: Any) -> None:
        if len(args[0]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def loss(self, model: Any, batch: Any) -> Tensor:
        try:
            return super().loss(model, batch)
        except torch.OutOfMemoryError:
            parts = [super(Retries, self).loss(model, {k: batch[k][i::2] for k in ("x", "y")}) for i in (0, 1)]
            return sum(parts) / 2  # type: ignore[return-value]


class RetriesLate(Retries):
    """The same in the middle of the model."""

    def begin(self) -> None:
        self.model.layers[1].register_forward_pre_hook(self.fail)


class Vmapped(World):
    """A function of the output runs under vmap."""

    def loss(self, model: Any, batch: Any) -> Tensor:
        return torch.vmap(lambda p, y: (p - y).square().mean())(model(batch["x"]), batch["y"]).mean()


class Accumulated(World):
    """Micro-batches inside of the loss."""

    def loss(self, model: Any, batch: Any) -> Tensor:
        return sum(super(Accumulated, self).loss(model, {k: batch[k][i : i + 2] for k in ("x", "y")}) for i in (0, 2))  # type: ignore[return-value]


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_around_the_model_is_told(kind: str) -> None:
    class Vmap(World):
        def loss(self, model: Any, batch: Any) -> Tensor:
            return (torch.vmap(model)(batch["x"]) - batch["y"]).square().mean()

    ours = Vmap()
    with LfURegularizer(ours.model, kind) as reg, pytest.raises(RuntimeError, match=r"torch\.func transform"):
        reg(ours.model, ours.batch(0), ours.loss)


class Clears(World):
    """The loss clears hook tables, ours among them."""

    when = "before"

    def loss(self, model: Any, batch: Any) -> Tensor:
        if self.when == "before":
            for module in model.modules():
                module._forward_hooks.clear()
        loss = super().loss(model, batch)
        for module in model.modules():
            module._forward_hooks.clear()
        return loss


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_cleared_before_the_call_are_told(kind: str) -> None:
    """An error, never a step that compares nothing or perturbs nothing."""
    ours = Clears()
    with LfURegularizer(ours.model, kind) as reg, pytest.raises(RuntimeError, match="returned nothing"):
        reg(ours.model, ours.batch(0), ours.loss)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in ours.model.modules())


class ClearsAfterwards(Clears):
    when = "after"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("where", range(16))
def test_exceptions_leave_everything_as_it_was(kind: str, error: type[BaseException], where: int) -> None:
    """An error at each call of a module in either pass changes nothing but what plain SFT would have changed."""

    class Fails(World):
        armed = False

        def begin(self) -> None:
            self.calls = 0
            self.model.register_buffer("seen", torch.zeros(()))
            for module in self.model.modules():
                module.register_forward_pre_hook(self.count)

        def count(self, module: nn.Module, args: Any) -> None:
            self.calls += 1
            if self.armed and self.calls == where + 1:
                raise error("stop")

    ours = Fails()
    ours.model.layers[1].a.weight.grad = torch.ones(6, 6).double()
    before = copy.deepcopy(ours.model.state_dict())
    tables = [{k: dict(v) if isinstance(v, dict) else v for k, v in vars(m).items()} for m in ours.model.modules()]
    with LfURegularizer(ours.model, kind, alpha=ALPHA, lam=LAM, seed=1) as reg:
        ours.armed = True
        with contextlib.suppress(error):
            reg(ours.model, ours.batch(0), ours.loss)
        ours.armed = False
        assert_equal("state", ours.model.state_dict(), before)
        assert torch.equal(ours.model.layers[1].a.weight.grad, torch.ones(6, 6).double())
        after = [{k: dict(v) if isinstance(v, dict) else v for k, v in vars(m).items()} for m in ours.model.modules()]
        assert all(
            list(now) == list(then) and all(now[k] is then[k] or now[k] == then[k] for k in now if k != "_buffers")
            for now, then in zip(after, tables, strict=True)
        )
        assert torch.is_grad_enabled()


@pytest.mark.parametrize("kind", KINDS)
def test_two_models_in_turn(kind: str) -> None:
    """A GAN: the generator's loss runs through the discriminator, which has a regularizer of its own."""
    one, other = World(), World()
    other.model.inp = nn.Linear(4, 6).double()
    alone = copy.deepcopy(one)

    def loss(model: Any, batch: Any) -> Tensor:
        return other.model(model(batch["x"])).square().mean()

    with (
        LfURegularizer(one.model, kind, alpha=ALPHA, lam=LAM, seed=1) as reg,
        LfURegularizer(other.model, kind, alpha=ALPHA, lam=LAM, seed=1) as critic,
    ):
        seed_everything(0)
        reg(one.model, one.batch(0), loss).backward()
        critic(other.model, one.batch(0), lambda m, b: m(b["y"]).square().mean()).backward()
    with LfURegularizer(alone.model, kind, alpha=ALPHA, lam=LAM, seed=1) as reg:
        seed_everything(0)
        reg(alone.model, alone.batch(0), loss).backward()
    assert_equal(
        "gradient of", {n: p.grad for n, p in one.trained().items()}, {n: p.grad for n, p in alone.trained().items()}
    )


SITUATIONS = [
    ClearsAfterwards, Tied, TiedEmbedding, Tupled, Keyword, Returned, Generated, Compiled, Retries, RetriesLate,
    Vmapped, Accumulated,
]  # fmt: skip


@pytest.mark.parametrize("world", SITUATIONS)
def test_around_the_model(world: type[World]) -> None:
    assert_exact(world)


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_training_step(kind: str) -> None:
    """It breaks at the regularizer, and gives what it gives uncompiled."""
    found = []
    for compiled in (True, False):
        seed_everything(0)
        ours = World()
        with LfURegularizer(ours.model, kind, alpha=ALPHA, lam=LAM, seed=1) as reg:

            def step(batch: Any) -> Tensor:
                loss = reg(ours.model, batch, ours.loss)  # noqa: B023
                loss.backward()
                return loss.detach()

            step = torch.compile(step, backend="eager") if compiled else step
            losses = [step(ours.batch(number)) for number in range(2)]
        found.append((losses, {name: weight.grad for name, weight in ours.trained().items()}))
    torch._dynamo.reset()
    assert_equal("step", *found)


@pytest.mark.parametrize("kind", ["steering", "lora", "weights"])
def test_nested_tensors_are_told(kind: str) -> None:
    rows = [torch.randn(3, 6).double(), torch.randn(5, 6).double()]
    model = nn.Sequential(*World().model.layers)
    with LfURegularizer(model, kind) as reg, pytest.raises(ValueError, match=r"nested tensor.*Pad"):
        reg(model, torch.nested.nested_tensor(rows, layout=torch.jagged), lambda m, b: m(b).values().square().mean())
