"""Where forwards keep things: in containers of any kind, past the version counter, on tensors, and beside the model."""

from __future__ import annotations

import copy
import random
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lfu_reg import LfURegularizer, LfUWarning
from tests.support.literal import Block, Net, World, assert_equal, assert_exact, assert_plain

KINDS = ("steering", "weights")


class Schedule:
    """An object that is called, and counts."""

    def __init__(self) -> None:
        self.n = 0

    def __call__(self) -> int:
        self.n += 1
        return self.n


class OfAPackageNamedSo(Schedule):
    """Its class is in torchvision, torch_geometric, ..., which are not torch."""

    __module__ = "torchsomething.schedules"


class Keeping(Net):
    """Scales, between blocks, by what `change` makes of `kept`."""

    make: Callable[[], Any]
    change: Callable[[Any], Any]

    def __init__(self) -> None:
        super().__init__()
        self.kept = type(self).make()

    def forward(self, x: Tensor) -> Tensor:
        h = self.layers[1](self.layers[0](self.inp(x)))
        return self.out(self.layers[2](h * (1 + 0.1 * float(type(self).change(self.kept)))))


def keeping(make: Callable[[], Any], change: Callable[[Any], Any]) -> type[World]:
    net = type("Kept", (Keeping,), {"make": staticmethod(make), "change": staticmethod(change)})
    return type("KeepingWorld", (World,), {"net": net})


def count(table: Any) -> int:
    table["n"] += 1
    return int(table["n"])


def count_array(array: Any) -> float:
    array[0] += 1
    return float(array[0])


def append(table: Any) -> int:
    table.append(1)
    return len(table)


PLACES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "random.Random": (lambda: random.Random(0), lambda r: r.random()),
    "numpy RandomState": (lambda: np.random.RandomState(0), lambda r: r.rand()),
    "default dict": (lambda: defaultdict(int), count),
    "counter": (Counter, count),
    "array": (lambda: np.zeros(1), count_array),
    "list in a tuple": (lambda: ([],), lambda kept: append(kept[0])),
    "tensor in a list": (lambda: [torch.zeros(())], lambda kept: kept[0].add_(1)),
    "tensor in a tuple": (lambda: (torch.zeros(()),), lambda kept: kept[0].add_(1)),
    "tensor in a deque": (lambda: deque([torch.zeros(())]), lambda kept: kept[0].add_(1)),
    "object that is called": (Schedule, lambda kept: kept()),
    "object of another package": (OfAPackageNamedSo, lambda kept: kept()),
    "deep dict": (lambda: {"a": {"b": {"c": {"n": 0}}}}, lambda kept: count(kept["a"]["b"]["c"])),
}


@pytest.mark.parametrize("place", PLACES)
def test_where_modules_keep_things(place: str) -> None:
    assert_exact(keeping(*PLACES[place]), KINDS)


class Written(World):
    """A running mean between the blocks, written by way of `.data`."""

    frozen, assigned = False, False

    class net(Net):
        def __init__(self) -> None:
            super().__init__()
            self.mean, self.assigned = nn.Parameter(torch.zeros(6), requires_grad=False), False

        def forward(self, x: Tensor) -> Tensor:
            h = self.layers[1](self.layers[0](self.inp(x)))
            if self.assigned:
                self.mean.data = 0.5 * self.mean.data + 0.5 * h.detach().mean(0)
            else:
                self.mean.data.mul_(0.5).add_(0.5 * h.detach().mean(0))
            return self.out(self.layers[2](h * (1 + self.mean)))

    def begin(self) -> None:
        self.model.assigned = self.assigned
        if not self.frozen:
            mean = self.model.mean.detach()
            del self.model.mean
            self.model.register_buffer("mean", mean)


@pytest.mark.parametrize("assigned", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_writes_past_the_version_counter(frozen: bool, assigned: bool) -> None:
    """As momentum encoders and codebooks are written to."""
    made = type("WrittenHere", (Written,), {"frozen": frozen, "assigned": assigned})
    assert_exact(made, KINDS, steps=7)


class Reset(World):
    class net(Net):
        def __init__(self) -> None:
            super().__init__()
            self.notes, self.keep = {"n": 0}, nn.Module()
            self.keep.notes = {"n": 0}

        def forward(self, x: Tensor) -> Tensor:
            h = self.layers[1](self.layers[0](self.inp(x)))
            return self.out(self.layers[2](h * (1 + 0.1 * count(self.notes) + 0.1 * count(self.keep.notes))))

    def after(self) -> Any:
        return {**super().after(), "notes": dict(self.model.notes), "kept": dict(self.model.keep.notes)}


@pytest.mark.parametrize("module", [False, True])
def test_what_is_replaced_between_steps(module: bool) -> None:
    """A dictionary of notes, or the module that has it."""

    def replace(world: World, step: int) -> None:
        if module:
            world.model.keep = nn.Module()
            world.model.keep.notes = {"n": 0}
        else:
            world.model.notes = {"n": 0}

    assert_exact(Reset, KINDS, steps=3, between=replace)


class Beside(World):
    """A head with statistics, a momentum teacher and a generator are no parts of the model."""

    def begin(self) -> None:
        self.head = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4)).double()
        self.teacher, self.random = copy.deepcopy(self.model).requires_grad_(False), random.Random(0)

    def trained(self) -> dict[str, Tensor]:
        return {**super().trained(), **{f"head.{n}": p for n, p in self.head.named_parameters()}}

    def after(self) -> Any:
        return {**self.model.state_dict(), **self.head.state_dict(), "teacher": [*self.teacher.parameters()]}

    def loss(self, model: Any, batch: Any) -> Tensor:
        with torch.no_grad():
            for theirs, ours in zip(self.teacher.parameters(), model.parameters(), strict=True):
                theirs.mul_(0.9).add_(0.1 * ours)
            target = self.teacher(batch["x"])
        h = model.layers[1](model.layers[0](model.inp(batch["x"])))
        out = model.out(model.layers[2](h * (1 + self.random.random())))
        return (self.head(out) - batch["y"]).square().mean() + (out - target).square().mean()


@pytest.mark.parametrize("closure", [False, True])
def test_what_the_loss_function_holds(closure: bool) -> None:
    """By `self`, or as a closure."""

    class Closure(Beside):
        def begin(self) -> None:
            super().begin()
            self.whole = self.__dict__

        @property
        def loss(self) -> Any:  # type: ignore[override]
            world, head, teacher, generator = self, self.head, self.teacher, self.random

            def loss(model: Any, batch: Any) -> Tensor:
                assert (head, teacher, generator) == (world.head, world.teacher, world.random)
                return Beside.loss(world, model, batch)

            return loss

    assert_exact(Closure if closure else Beside, KINDS, steps=3)


class Ways(Beside):
    """The same by helpers: what they name in their turn is found as well."""

    way = ""

    def begin(self) -> None:
        super().begin()
        head, teacher, generator, plain = self.head, self.teacher, self.random, Beside.loss

        def loss(
            model: Any, batch: Any, head: Any = head, teacher: Any = teacher, generator: Any = generator
        ) -> Tensor:
            world = SimpleNamespace(head=head, teacher=teacher, random=generator)
            return plain(world, model, batch)  # type: ignore[arg-type]

        def bare(model: Any, batch: Any, *, head: Any, teacher: Any, generator: Any) -> Tensor:
            return loss(model, batch, head, teacher, generator)

        def helper(model: Any, batch: Any) -> Tensor:
            return bare(model, batch, head=head, teacher=teacher, generator=generator)

        self.whole = {
            "default arguments": loss,
            "partial": partial(bare, head=head, teacher=teacher, generator=generator),
            "a helper's": lambda model, batch: helper(model, batch),
            "a decorator's": torch.enable_grad()(helper),
            "in a container": Trainer({"loss": helper}).loss,
            "the function is a module": LossModule(head, teacher, generator),
        }

    def __deepcopy__(self, memo: Any) -> Any:
        other = type(self)()
        for name in ("model", "head", "teacher", "random"):
            own, theirs = getattr(self, name), getattr(other, name)
            theirs.setstate(own.getstate()) if name == "random" else theirs.load_state_dict(own.state_dict())
        return other

    @property
    def loss(self) -> Any:  # type: ignore[override]
        return self.whole[self.way]

    def after(self) -> Any:
        return {**super().after(), "random": str(self.random.getstate())}


class Trainer:
    def __init__(self, kept: Any) -> None:
        self.kept = kept

    def loss(self, model: Any, batch: Any) -> Tensor:
        return self.kept["loss"](model, batch)  # type: ignore[no-any-return]


class LossModule(nn.Module):
    """A loss function that is a module itself, with a count."""

    def __init__(self, head: nn.Module, teacher: nn.Module, generator: Any) -> None:
        super().__init__()
        self.head, self.teacher, self.random, self.calls = head, teacher, generator, 0

    def forward(self, model: Any, batch: Any) -> Tensor:
        self.calls += 1
        assert self.calls < 100
        return Beside.loss(self, model, batch)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "way",
    ["default arguments", "partial", "a helper's", "a decorator's", "in a container", "the function is a module"],
)
def test_what_helpers_of_the_loss_function_hold(way: str) -> None:
    assert_exact(type("WaysHere", (Ways,), {"way": way}), KINDS, steps=2)


class Hidden(World):
    """Blocks hide modules that are no parts of the model, and keep statistics, from `parameters()`."""

    inside: Callable[[nn.Module], Any] = staticmethod(lambda module: [module])

    class net(Net):
        class block(Block):
            def __init__(self) -> None:
                super().__init__()
                self.hidden: Any = None

            def forward(self, h: Tensor) -> Tensor:
                kept = self.hidden[0] if isinstance(self.hidden, list) else self.hidden.module
                kept(h.detach())
                return super().forward(h - kept.running_mean)

    def begin(self) -> None:
        for layer in self.model.layers:
            layer.hidden = type(self).inside(nn.BatchNorm1d(6).double().requires_grad_(False))

    @property
    def loss(self) -> Any:  # type: ignore[override]
        return lambda model, batch: (model(batch["x"]) - batch["y"]).square().mean()


@pytest.mark.parametrize("place", ["list", "object"])
def test_modules_that_a_model_hides(place: str) -> None:
    inside = {"list": lambda m: [m], "object": lambda m: SimpleNamespace(module=m)}[place]
    assert_exact(type("HiddenHere", (Hidden,), {"inside": staticmethod(inside)}), KINDS)


class Slotted:
    __slots__ = ("n",)

    def __init__(self) -> None:
        self.n = 0


class OutOfReach(World):
    """What scales the states between blocks is counted where nothing is put back, and no input tells it."""

    class net(Net):
        def __init__(self) -> None:
            super().__init__()
            self.slotted, self.scale, self.count = Slotted(), 1.0, False

        def forward(self, x: Tensor) -> Tensor:
            h = self.layers[1](self.layers[0](self.inp(x)))
            self.slotted.n += self.count
            return self.out(self.layers[2](h * (self.scale + 0.1 * self.slotted.n)))

    def begin(self) -> None:
        self.model.count = True


class OwnSchedule(OutOfReach):
    def begin(self) -> None:
        self.n = 0

    def loss(self, model: Any, batch: Any) -> Tensor:
        self.n += 1
        model.scale = 1 + 0.1 * self.n
        return super().loss(model, batch)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [OutOfReach, OwnSchedule])
def test_what_nothing_puts_back_is_told_where_alpha_is_looked_for(world: type[World], kind: str) -> None:
    """Pass 2 is tried there anyway; with an alpha of the user's own there are two calls, and nobody sees it."""
    ours = world()
    plain = copy.deepcopy(ours)
    with LfURegularizer(ours.model, kind) as reg:
        with pytest.warns(LfUWarning, match="hidden states differ where nothing is perturbed"):
            loss = reg(ours.model, ours.batch(0), ours.loss)
        assert reg.metrics["unrepeatable_steps"] == 1
        reg(ours.model, ours.batch(1), ours.loss)  # which waits
        assert reg.metrics["unrepeatable_steps"] == 1
    assert_equal("loss", loss.detach(), plain.loss(plain.model, plain.batch(0)).detach())


class Scheduled(World):
    """The model is called with a number that the loss function counts."""

    class net(Net):
        def forward(self, x: Tensor, scale: float) -> Tensor:
            return self.out(self.layers[2](self.layers[1](self.layers[0](self.inp(x))) * scale))

    def begin(self) -> None:
        self.n = 0

    def loss(self, model: Any, batch: Any) -> Tensor:
        self.n += 1
        return (model(batch["x"], 1 + 0.1 * self.n) - batch["y"]).square().mean()


class ScheduledInADict(Scheduled):
    """A tensor, in a dictionary."""

    class net(Net):
        def forward(self, given: Any) -> Tensor:
            h = self.layers[1](self.layers[0](self.inp(given["x"])))
            return self.out(self.layers[2](h * given["scale"]))

    def loss(self, model: Any, batch: Any) -> Tensor:
        self.n += 1
        given = {"x": batch["x"], "scale": torch.tensor(1 + 0.1 * self.n)}
        return (model(given) - batch["y"]).square().mean()


@pytest.mark.parametrize("world", [Scheduled, ScheduledInADict])
def test_a_schedule_of_the_loss_function_is_told(world: type[World]) -> None:
    assert_plain(world, "the input of the model's call 1 differs", KINDS, steps=1)


def test_a_model_that_runs_in_a_thread() -> None:
    with ThreadPoolExecutor(1) as pool:

        class InThread(World):
            def loss(self, model: Any, batch: Any) -> Tensor:
                return (pool.submit(model, batch["x"]).result() - batch["y"]).square().mean()

        assert_exact(InThread)
        assert_exact(InThread, ["steering", "lora"], strategy="retained")
        ours = InThread()
        reg = LfURegularizer(ours.model, "weights", strategy="retained")
        with pytest.raises(RuntimeError, match="A model in a thread, with moved weights, does not go"):
            reg(ours.model, ours.batch(0), ours.loss)


class Noted(World):
    """A block notes on the tensor that it returns how the next one is to scale."""

    class net(Net):
        class block(Block):
            def forward(self, h: Tensor) -> Tensor:
                scale = getattr(h, "scale", 1.0)
                out = super().forward(h) * scale
                out.scale = 1.5  # type: ignore[attr-defined]
                return out


@pytest.mark.parametrize("layers", ["all", "late"])
@pytest.mark.parametrize("kind", ["steering", "lora", "weights"])
def test_attributes_of_tensors(kind: str, layers: str) -> None:
    ours = Noted()
    plain = ours.loss(ours.model, ours.batch(0)).detach()
    with LfURegularizer(ours.model, kind, layers=layers, alpha=1e-9, lam=1.0) as reg:
        reg(ours.model, ours.batch(0), ours.loss)
    torch.testing.assert_close(reg.metrics["sft_loss"], plain)
    assert float(reg.metrics["consistency_loss"]) < 1e-12  # both passes note, and read


class Figure(World):
    """A gradient that is looked at behind the last layer, while alpha is searched."""

    def loss(self, model: Any, batch: Any) -> Tensor:
        out = model(batch["x"])
        torch.autograd.grad(out.sum(), model.inp.weight, retain_graph=True)
        return (out - batch["y"]).square().mean()


def test_a_gradient_behind_the_last_layer_at_the_first_step() -> None:
    ours = Figure()
    with LfURegularizer(ours.model, "steering") as reg:
        for step in range(2):
            reg(ours.model, ours.batch(step), ours.loss)
            assert reg.metrics["gradient_ratio"] > 0


def test_an_optimizer_in_the_loss_is_refused() -> None:
    """Where it would step twice; the first call is plain training's."""
    critic = nn.Linear(4, 1).double()
    optimizer = torch.optim.Adam(critic.parameters())

    def loss(model: Any, batch: Any) -> Tensor:
        out = model(batch["x"])
        if not reg.is_second_pass or batch["always"]:
            critic(out.detach()).mean().backward()
            optimizer.step()
        return (out - batch["y"]).square().mean()

    ours = World()
    with LfURegularizer(ours.model, "steering", alpha=0.1, lam=1.0) as reg:
        reg(ours.model, {**ours.batch(0), "always": False}, loss)
        assert [int(state["step"]) for state in optimizer.state.values()] == [1, 1]
        with pytest.raises(RuntimeError, match="is_second_pass"):
            reg(ours.model, {**ours.batch(1), "always": True}, loss)


def test_a_part_of_the_batch_and_batch_norm() -> None:
    """Its means of the part are others than those of the whole; in eval mode it mixes nothing."""
    ours = World()
    ours.model.layers[1].a = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 6)).double()
    with LfURegularizer(ours.model, "steering", alpha=0.1, lam=1.0, batch_fraction=0.5) as reg:
        with pytest.raises(ValueError, match="batch norm"):
            reg(ours.model, ours.batch(0), ours.loss)
        ours.model.layers[1].a[0].eval()
        reg(ours.model, ours.batch(0), ours.loss)
