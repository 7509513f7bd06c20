"""Forwards that do not repeat: what the model writes while it runs, counters, queues, generators, iterators."""

from __future__ import annotations

import copy
import random
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lfu_reg import LfURegularizer, LfUWarning
from tests.support.literal import (
    ALPHA,
    LAM,
    Block,
    Net,
    World,
    assert_equal,
    assert_exact,
    literal_step,
    seed_everything,
)


class Counting(Net):
    """Counts in every way there is, and what it computes depends on the counts."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.notes, self.seen = 0, {"n": 0}, [0]
        self.register_buffer("n", torch.zeros((), dtype=torch.long))
        self.plain = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.notes["n"] += 1
        self.seen.append(self.calls)
        self.n += 1
        self.plain = self.plain + 1
        scale = 1 + 0.1 * (self.calls + self.notes["n"] + len(self.seen) + int(self.n) + float(self.plain))
        return super().forward(x * scale)


class ModelCounts(World):
    net = Counting

    def after(self) -> Any:
        m = self.model
        return {
            **super().after(),
            "notes": dict(m.notes),
            "calls": m.calls,
            "seen": list(m.seen),
            "plain": m.plain.clone(),
        }


class ConfigCounts(World):
    """A counter is an attribute of a config object, or nested in a mapping of mappings."""

    class net(Net):
        def __init__(self) -> None:
            super().__init__()
            self.config = SimpleNamespace(step=0)

        def forward(self, x: Tensor) -> Tensor:
            self.config.step += 1
            return super().forward(x * (1 + 0.1 * self.config.step))

    def after(self) -> Any:
        return {**super().after(), "step": self.model.config.step}


class NestedCounts(World):
    class net(Net):
        def __init__(self) -> None:
            super().__init__()
            self.state = {"ema": {"step": 0}, "list": [[0]]}

        def forward(self, x: Tensor) -> Tensor:
            self.state["ema"]["step"] += 1
            self.state["list"][0].append(1)
            return super().forward(x * (1 + 0.1 * self.state["ema"]["step"] + 0.1 * len(self.state["list"][0])))

    def after(self) -> Any:
        return {**super().after(), "state": copy.deepcopy(self.model.state)}


class LateConfigCounts(ConfigCounts):
    """Between blocks, where a perturbation reaches and no input tells it."""

    class net(Net):
        def __init__(self) -> None:
            super().__init__()
            self.config = SimpleNamespace(step=0)

        def forward(self, x: Tensor) -> Tensor:
            h = self.layers[1](self.layers[0](self.inp(x)))
            self.config.step += 1
            return self.out(self.layers[2](h * (1 + 0.1 * self.config.step)))


class LateNestedCounts(NestedCounts):
    class net(Net):
        def __init__(self) -> None:
            super().__init__()
            self.state = {"ema": {"step": 0}}

        def forward(self, x: Tensor) -> Tensor:
            h = self.layers[1](self.layers[0](self.inp(x)))
            self.state["ema"]["step"] += 1
            return self.out(self.layers[2](h * (1 + 0.1 * self.state["ema"]["step"])))


class LateTensorInDict(World):
    class net(Net):
        def __init__(self) -> None:
            super().__init__()
            self.state = {"mean": torch.zeros(6).double()}

        def forward(self, x: Tensor) -> Tensor:
            h = self.layers[1](self.layers[0](self.inp(x)))
            self.state["mean"].mul_(0.5).add_(h.detach().mean(0))
            return self.out(self.layers[2](h - self.state["mean"]))

    def after(self) -> Any:
        return {**super().after(), "mean": self.model.state["mean"].clone()}


class Codebook(Block):
    """A running mean and a count, written in the forward and used by it (VQ)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, h: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(0.1 * h.detach().mean(0))
        self.seen += 1
        return super().forward(h - self.mean / self.seen)


class VectorQuantised(World):
    class net(Net):
        block = Codebook


class Queue(World):
    """MoCo: an EMA teacher is updated in the loss, and its features fill a queue, which is a buffer of the model."""

    class net(Net):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = Net().requires_grad_(False)
            self.register_buffer("queue", torch.randn(4, 8))
            self.register_buffer("at", torch.zeros(1, dtype=torch.long))

    def loss(self, model: Any, batch: Any) -> Tensor:
        with torch.no_grad():
            for ours, theirs in zip(model.layers.parameters(), model.teacher.layers.parameters(), strict=True):
                theirs.mul_(0.5).add_(ours, alpha=0.5)
            key = model.teacher(batch["x"] + 0.1 * torch.randn(5, 3).double())
        query = model(batch["x"])
        loss = -(query * key).sum(-1).mean() + (query @ model.queue.clone()).logsumexp(-1).mean()
        at = int(model.at)
        model.queue[:, at : at + 2] = key[:2].T
        model.at[0] = (at + 2) % 8
        return loss


class BatchNorm(World):
    class net(Net):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(6)
            self.layers[1].a = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 6), nn.Dropout(0.3))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + self.norm(self.inp(x))[:, :3])


class Spectral(World):
    def begin(self) -> None:
        nn.utils.parametrizations.spectral_norm(self.model.layers[1].a)
        nn.utils.parametrizations.weight_norm(self.model.layers[2].b)


class OwnGenerator(World):
    """A torch.Generator that a module holds."""

    def begin(self) -> None:
        self.model.generator = torch.Generator().manual_seed(3)

    def __deepcopy__(self, memo: Any) -> Any:
        generator = self.model.__dict__.pop("generator")
        other = type(self).__new__(type(self))
        other.model = copy.deepcopy(self.model, memo)
        self.model.generator, other.model.generator = generator, generator.clone_state()
        return other

    def loss(self, model: Any, batch: Any) -> Tensor:
        noise = torch.randn(5, 3, generator=model.generator, dtype=torch.float64)
        return super().loss(model, {**batch, "x": batch["x"] + noise})


class LossGenerator(World):
    """A numpy Generator of the loss function's own."""

    def begin(self) -> None:
        self.random = np.random.default_rng(0)

    def loss(self, model: Any, batch: Any) -> Tensor:
        return super().loss(model, {**batch, "x": batch["x"] + torch.from_numpy(self.random.normal(size=(5, 3)))})


class LossCounter(World):
    """A schedule that the loss function keeps itself, by which inputs are noised."""

    def begin(self) -> None:
        self.step = 0

    def loss(self, model: Any, batch: Any) -> Tensor:
        self.step += 1
        return super().loss(model, {**batch, "x": batch["x"] * (1 + 0.1 * self.step)})


class ModuleGenerator(World):
    """A numpy Generator that a module holds."""

    class net(Net):
        def __init__(self) -> None:
            super().__init__()
            self.random = np.random.default_rng(0)

        def forward(self, x: Tensor) -> Tensor:
            h = self.layers[1](self.layers[0](self.inp(x)))
            return self.out(self.layers[2](h + torch.from_numpy(self.random.normal(size=(5, 6)))))


class Annealed:
    """A callable that counts its calls."""

    calls = 0

    def __call__(self) -> float:
        self.calls += 1
        return 1 + 0.1 * self.calls


class Helpers(World):
    """Generators of the older kinds, a callable and a counter that a module holds, used between blocks."""

    class net(Net):
        def __init__(self) -> None:
            super().__init__()
            self.numpy, self.python = np.random.RandomState(0), random.Random(0)
            self.annealed, self.seen = Annealed(), Counter()

        def forward(self, x: Tensor) -> Tensor:
            self.seen["calls"] += 1
            h = self.layers[1](self.layers[0](self.inp(x))) * self.annealed() * self.seen["calls"]
            return self.out(self.layers[2](h * self.python.random() + torch.from_numpy(self.numpy.normal(size=(5, 6)))))

    def after(self) -> Any:
        return {**super().after(), "calls": [self.model.annealed.calls, self.model.seen["calls"]]}


class WrittenInPlace(World):
    """Residuals in place, and a list of hidden states that grows."""

    class net(Net):
        def __init__(self) -> None:
            super().__init__()
            self.hidden: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            h = self.inp(x)
            for layer in self.layers:
                h = layer(h).add_(h)
                self.hidden.append(h)
            out = self.out(torch.stack(self.hidden).mean(0))
            self.hidden.clear()
            return out


class WrittenWeights(World):
    """A trained weight shrinks in the forward, behind a block and at the model's own input."""

    class net(Net):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.inp.weight.mul_(0.9)
            h = self.layers[0](self.inp(x))
            with torch.no_grad():
                self.layers[1].a.weight.mul_(0.9)
            return self.out(self.layers[2](self.layers[1](h)))


SITUATIONS = [
    ModelCounts, VectorQuantised, BatchNorm, Spectral, OwnGenerator, WrittenInPlace,
    ConfigCounts, NestedCounts,
    LateConfigCounts, LateNestedCounts,
    LateTensorInDict, ModuleGenerator, LossGenerator, Helpers,
]  # fmt: skip


class MaxNorm(World):
    """An embedding that is scaled down to a norm where it is looked up."""

    class net(Net):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 3, max_norm=0.5)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + self.embed(torch.arange(5)))


@pytest.mark.filterwarnings("ignore:LfU collapses:lfu_reg.LfUWarning")
@pytest.mark.parametrize("steps", [1, 2], ids=["one ascent step", "two"])
@pytest.mark.parametrize("kind", ["steering", "lora", "weights"])
@pytest.mark.parametrize("world", [WrittenWeights, MaxNorm])
def test_trained_weights_written_by_the_forward(world: type[World], kind: str, steps: int) -> None:
    """The first step does not know them in time, and says so; from then on every pass starts from the same weights."""
    ours = world()
    wanted = copy.deepcopy(ours)
    options: dict[str, Any] = {"alpha": ALPHA, "lam": LAM, "seed": 1, "ascent_steps": steps}
    with LfURegularizer(ours.model, kind, **options) as reg:
        with pytest.warns(LfUWarning, match=r"This step is plain SFT: the forward wrote to (inp|embed)\.weight"):
            loss = reg(ours.model, ours.batch(0), ours.loss)
        loss.backward()
        assert_plain_step(ours, wanted, loss)
        for step in (1, 2):
            for trained in (ours.trained(), wanted.trained()):
                for weight in trained.values():
                    weight.grad = None
            reg(ours.model, ours.batch(step), ours.loss).backward()
            a = {n: v[0] for n, v in reg.perturbation.items()} if kind == "lora" else None
            literal = literal_step(wanted, wanted.batch(step), kind, step, a) if steps == 1 else None
            if literal is None:
                wanted.loss(wanted.model, wanted.batch(step))
            else:
                gradients = {n: p.grad for n, p in ours.trained().items()}
                assert_equal(f"step {step}, gradient of", gradients, literal.gradients)
            assert_equal(f"step {step}, state", ours.after(), wanted.after())


def test_frozen_weights_written_in_the_loss() -> None:
    """A teacher follows once a step, also at the first one, where nobody knows of it yet."""
    for kind in ("steering", "lora", "weights"):
        ours = Queue()
        wanted = copy.deepcopy(ours)
        with LfURegularizer(ours.model, kind, alpha=ALPHA, lam=LAM, seed=1, layers=list(ours.layers())) as reg:
            for step in range(3):
                seed_everything(step)
                reg(ours.model, ours.batch(step), ours.loss)
                assert "ascent_grad_norm" in reg.metrics
                seed_everything(step)
                wanted.loss(wanted.model, wanted.batch(step))
                assert_equal(f"{kind}, step {step}, state", ours.after(), wanted.after())


class Taken(World):
    """An iterator of the loss's own: the second call takes another batch."""

    def begin(self) -> None:
        self.more = [self.batch(100 + n)["x"] for n in range(40)]

    def loss(self, model: Any, batch: Any) -> Tensor:
        return super().loss(model, batch) + model(self.more.pop()).square().mean()


@pytest.mark.parametrize("world", [LossCounter, Taken])
def test_what_the_loss_keeps_is_told_at_the_first_step(world: type[World]) -> None:
    ours = world()
    plain = copy.deepcopy(ours)
    with LfURegularizer(ours.model, "steering", alpha=ALPHA, lam=LAM, seed=1) as reg:
        with pytest.warns(LfUWarning, match="This step is plain SFT"):
            loss = reg(ours.model, ours.batch(0), ours.loss)
        loss.backward()
    assert_plain_step(ours, plain, loss)


def assert_plain_step(ours: World, plain: World, loss: Tensor) -> None:
    wanted = plain.loss(plain.model, plain.batch(0))
    wanted.backward()
    assert_equal("loss", loss.detach(), wanted.detach())
    gradients = {n: p.grad for n, p in ours.trained().items()}
    assert_equal("gradient of", gradients, {n: p.grad for n, p in plain.trained().items()})


@pytest.mark.parametrize("world", SITUATIONS)
def test_what_the_model_keeps_is_put_back(world: type[World]) -> None:
    assert_exact(world, steps=3)


class Whole(nn.Module):
    """What surrounds the attached part: batch norm before and behind it, and a count."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.calls = Net(), 0
        self.stem, self.head = nn.BatchNorm1d(3), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(self.part(self.stem(x)))


@pytest.mark.parametrize("kind", ["steering", "lora", "weights"])
def test_a_regularizer_on_a_part_puts_back_what_the_whole_keeps(kind: str) -> None:
    seed_everything(0)
    ours = Whole().double()
    plain, batch = copy.deepcopy(ours), World().batch(0)
    with LfURegularizer(ours.part, kind, alpha=ALPHA, lam=LAM) as reg:
        for _ in range(2):
            reg(ours, batch, lambda m, b: (m(b["x"]) - b["y"]).square().mean()).backward()
            assert float(reg.metrics["consistency_loss"]) > 0
            plain(batch["x"])
    assert_equal("state", {**ours.state_dict(), "calls": ours.calls}, {**plain.state_dict(), "calls": plain.calls})
