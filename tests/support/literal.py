"""One LfU step as the paper reads, for whole situations: three plain forwards in float64, each in a world of its own.

A world holds a model, a loss function (a method, so that what it counts, draws and collects is part of the world) and
whatever surrounds them. Each forward runs in a deep copy of the world as the step found it, so nothing has to be put
back. It shares no code with the library.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lfu_reg import LfURegularizer, LfUWarning

ALPHA, LAM, SCALE = 0.4, 3.0, 2.0


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.b(torch.tanh(self.a(h)))


class Net(nn.Module):
    """A stack of them."""

    block: Callable[[], nn.Module] = Block

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(3, 6), nn.Linear(6, 4)
        self.layers = nn.ModuleList(type(self).block() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        for layer in self.layers:
            h = layer(h)
        return self.out(torch.tanh(h))


class World:
    """Model, loss and surroundings; tests make their own kinds of it.

    Attributes:
        stack: name of the list of layers.
    """

    net: Callable[[], nn.Module] = Net
    stack = "layers"

    def __init__(self) -> None:
        self.model = type(self).net().double()
        self.begin()

    def begin(self) -> None:
        """Set the surroundings up."""

    def loss(self, model: Any, batch: Any) -> Tensor:
        """The loss function."""
        return (model(batch["x"]) - batch["y"]).square().mean()

    def batch(self, step: int) -> Any:
        """The batch of a step."""
        g = torch.Generator().manual_seed(step)
        draw = lambda *shape: torch.randn(*shape, generator=g).double()  # noqa: E731
        return {"x": draw(5, 3), "y": draw(5, 4), "step": step}

    def trained(self) -> dict[str, Tensor]:
        """What is trained, by name."""
        return self.own()

    def own(self) -> dict[str, Tensor]:
        """What "weights" moves."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def layers(self) -> dict[str, nn.Module]:
        """The layers that the regularizer chooses."""
        return {f"{self.stack}.{n}": m for n, m in self.model.get_submodule(self.stack).named_children()}

    def after(self) -> Any:
        """What a step must leave as plain training does."""
        return {name: value.clone() for name, value in self.model.state_dict().items()}


@dataclass
class Step:
    """Figures of one step."""

    loss: Tensor
    consistency: Tensor
    gradients: dict[str, Tensor | None]


def seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def forward(
    world: World, batch: Any, seed: int, sites: Iterable[str], edit: Any
) -> tuple[Tensor, list[tuple[str, Tensor]], list[Any]]:
    """Loss, hidden states, and the handles of hooks, which checkpoints need until the backward is done."""
    states: list[tuple[str, Tensor]] = []
    layers, sites = world.layers(), set(sites)
    running = [True]

    def hook(name: str, module: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
        if not torch.is_grad_enabled():
            return None
        hidden = out if isinstance(out, Tensor) else out[0]
        if name in sites:
            x = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
            hidden = edit(name, x, hidden)
        if name in layers and running[0]:
            states.append((name, hidden.clone()))
        return hidden if isinstance(out, Tensor) else type(out)((hidden, *out[1:]))

    handles = [
        world.model.get_submodule(name).register_forward_hook(partial(hook, name), with_kwargs=True, prepend=True)
        for name in dict.fromkeys([*layers, *sites])
    ]
    seed_everything(seed)
    try:
        return world.loss(world.model, batch), states, handles
    finally:
        running[0] = False


def literal_step(
    world: World, batch: Any, kind: str, seed: int, a_matrices: Mapping[str, Tensor] | None = None
) -> Step:
    """The step; leaves `world` as plain training would, without gradients."""
    moved, perturbed = copy.deepcopy(world), copy.deepcopy(world)
    point: dict[str, Tensor] = {}
    sites = world.layers() if kind == "steering" else (a_matrices or {})

    def edit(name: str, x: Tensor, y: Tensor) -> Tensor:
        if name not in point:
            shape = y.shape[-1:] if kind == "steering" else (y.shape[-1], len(a_matrices[name]))  # type: ignore[index]
            point[name] = torch.zeros(shape, dtype=y.dtype, requires_grad=True)
        part = point[name]
        return y + part if kind == "steering" else y + SCALE * (x @ a_matrices[name].T) @ part.T  # type: ignore[index]

    used, _, _ = forward(moved, copy.deepcopy(batch), seed, () if kind == "weights" else sites, edit)
    leaves = {n: p for n, p in moved.own().items() if p.requires_grad} if kind == "weights" else dict(point)
    g = dict(zip(leaves, torch.autograd.grad(used, list(leaves.values()), allow_unused=True), strict=True))
    g = {n: torch.zeros_like(leaves[n]) if v is None else v.detach() for n, v in g.items()}
    norm = torch.sqrt(sum((v.square().sum() for v in g.values()), torch.zeros(())))
    delta = {n: ALPHA * v / norm for n, v in g.items()}
    if kind == "weights":
        for name in delta:
            perturbed.own()[name].data += delta[name]
    point.clear()
    point.update(delta)
    _, again, _ = forward(perturbed, copy.deepcopy(batch), seed, () if kind == "weights" else sites, edit)
    loss, clean, handles = forward(world, copy.deepcopy(batch), seed, (), None)
    assert [n for n, _ in clean] == [n for n, _ in again]
    consistency = sum((h.detach() - hp).square().mean() for (_, h), (_, hp) in zip(clean, again, strict=True)) / len(
        clean
    )
    first = _gradients(loss, world.trained())
    for handle in handles:
        handle.remove()
    second = _gradients(LAM * consistency, perturbed.trained())
    total = {n: _sum(first.get(n), second.get(n)) for n in world.trained()}
    return Step((loss + LAM * consistency).detach(), consistency.detach(), total)


def _gradients(loss: Any, leaves: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    if not loss.requires_grad:
        return dict.fromkeys(leaves)
    leaves = {n: leaf for n, leaf in leaves.items() if leaf.requires_grad}
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), allow_unused=True), strict=True))


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else one if other is None else one + other


def assert_exact(
    make: Callable[[], World],
    kinds: Iterable[str] = ("steering", "lora", "weights"),
    steps: int = 2,
    between: Callable[[World, int], None] = lambda world, step: None,
    **settings: Any,
) -> None:
    """Every step is the literal one, and leaves what plain training leaves.

    Args:
        make: of the world.
        kinds: auxiliaries.
        steps: how many, with a step of SGD after each.
        between: what happens to the world between steps.
        settings: further ones of the regularizer.
    """
    for kind in kinds:
        seed_everything(0)
        ours = make()
        wanted = copy.deepcopy(ours)
        reg = LfURegularizer(ours.model, kind, alpha=ALPHA, lam=LAM, seed=1, **settings)
        try:
            for step in range(steps):
                batch = ours.batch(step)
                seed_everything(step)
                with warnings.catch_warnings():
                    warnings.simplefilter("error", LfUWarning)
                    warnings.filterwarnings("ignore", "These modules never ran|LfU collapses", LfUWarning)
                    loss = reg(ours.model, copy.copy(batch), ours.loss)
                drawn = torch.rand(1), random.random(), np.random.rand()
                loss.backward()
                a = {n: v[0] for n, v in reg.perturbation.items()} if kind == "lora" else None
                literal = literal_step(wanted, wanted.batch(step), kind, step, a)
                assert drawn == (torch.rand(1), random.random(), np.random.rand()), f"{kind}: random stream"
                gradients = {n: p.grad for n, p in ours.trained().items()}
                assert_equal(f"{kind}, step {step}, loss", loss.detach(), literal.loss)
                assert float(literal.consistency) > 1e-9, "the case compares nothing"
                assert_equal(f"{kind}, step {step}, gradient of", gradients, literal.gradients)
                assert_equal(f"{kind}, step {step}, state", ours.after(), wanted.after())
                with torch.no_grad():
                    for name, weight in ours.trained().items():
                        if (gradient := gradients[name]) is not None:
                            weight -= 0.05 * gradient
                            other = wanted.trained()[name]
                            other -= 0.05 * gradient
                        weight.grad = None
                between(ours, step)
                between(wanted, step)
        finally:
            reg.remove()


def assert_equal(what: str, got: Any, want: Any) -> None:
    """Equal to 1e-8, through containers; a missing gradient is zero."""
    if isinstance(want, Mapping):
        assert list(got) == list(want), f"{what}: {list(got)} instead of {list(want)}"
        for key in want:
            assert_equal(f"{what} {key}", got[key], want[key])
    elif isinstance(want, (list, tuple)):
        assert len(got) == len(want), f"{what}: {len(got)} entries instead of {len(want)}"
        for number, pair in enumerate(zip(got, want, strict=True)):
            assert_equal(f"{what} {number}", *pair)
    elif isinstance(want, Tensor) or isinstance(got, Tensor):
        got = torch.zeros_like(want) if got is None else got
        want = torch.zeros_like(got) if want is None else want
        scale = max(float(got.abs().max()), float(want.abs().max()), 1e-30) if got.numel() else 1.0
        off = float((got - want).abs().max()) / scale if got.numel() else 0.0
        assert off <= 1e-8, f"{what}: off by {off:.1e}"
    else:
        assert got == want, f"{what}: {got!r} instead of {want!r}"


def assert_plain(
    make: Callable[[], World], match: str, kinds: Iterable[str] = ("steering", "lora"), steps: int = 3
) -> None:
    """Every step is plain SFT, with one message; what it says is told at the first step at which it is true."""
    for kind in kinds:
        seed_everything(0)
        ours = make()
        wanted = copy.deepcopy(ours)
        with (
            LfURegularizer(ours.model, kind, alpha=ALPHA, lam=LAM, seed=1) as reg,
            warnings.catch_warnings(record=True) as told,
        ):
            warnings.simplefilter("always")
            for step in range(steps):
                loss = reg(ours.model, ours.batch(step), ours.loss)
                loss.backward()
                plain = wanted.loss(wanted.model, wanted.batch(step))
                plain.backward()
                assert_equal(f"{kind}, step {step}, loss", loss.detach(), plain.detach())
                assert_equal(
                    f"{kind}, step {step}, gradient of",
                    {n: p.grad for n, p in ours.trained().items()},
                    {n: p.grad for n, p in wanted.trained().items()},
                )
        messages = [str(entry.message) for entry in told if issubclass(entry.category, LfUWarning)]
        assert len([m for m in messages if match in m]) == 1, messages
