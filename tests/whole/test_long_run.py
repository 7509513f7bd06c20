"""Hundreds of steps with all that a loop does besides: nothing grows, and a resumed run continues bit for bit."""

from __future__ import annotations

import copy
import ctypes
import gc
import io
import pickle
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lfu_reg import LfURegularizer
from tests.support.cases import plain_loss, seeded, token_batch
from tests.support.harness import auxiliary
from tests.support.plain_models import TinyLM
from tests.support.snapshots import hook_counts, tensor_hook_counts

AUXILIARIES = ("lora", "steering", "weights", "random")
VOCAB = 13


def make_auxiliary(name: str) -> Any:
    return name if name == "random" else auxiliary(name)


def noisy_model() -> TinyLM:
    return seeded(lambda: TinyLM(dropout=0.2))


def random_batch(draw: random.Random) -> dict[str, Tensor]:
    rows, columns = draw.randint(1, 4), draw.randint(5, 11)
    return token_batch(draw.randint(0, 10**6), vocab=VOCAB, shape=(rows, columns))


class InTheLossError(Exception):
    pass


class InAHookError(Exception):
    pass


def broken_loss(model: Any, batch: Any) -> Tensor:
    plain_loss(model, batch)
    raise InTheLossError


def resident_bytes() -> int:
    pages = Path("/proc/self/statm")
    if not pages.exists():
        pytest.skip("needs /proc/self/statm")
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # what is free and merely kept does not count
        libc.malloc_trim(0)
    return int(pages.read_text().split()[1]) * 4096


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


class Loop:
    """A training loop in which, besides the steps, one of the other things happens at random."""

    def __init__(self, name: str) -> None:
        self.model = noisy_model()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.reg = LfURegularizer(self.model, make_auxiliary(name), alpha=0.05, lam=0.1)
        self.draw = random.Random(5)
        self.events: dict[str, int] = {}

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step()
            event = self.draw.choice([self.loss_raises, self.hook_raises, self.evaluate, self.copies, self.saves, None])
            if event is not None:
                event()
                self.events[event.__name__] = self.events.get(event.__name__, 0) + 1

    def step(self) -> None:
        for _ in range(self.draw.randint(1, 2)):
            self.reg(self.model, random_batch(self.draw), plain_loss).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def loss_raises(self) -> None:
        with pytest.raises(InTheLossError):
            self.reg(self.model, random_batch(self.draw), broken_loss)

    def hook_raises(self) -> None:
        """In pass 1 or in pass 2, before or after the library's own hook on that block."""
        left = self.draw.randint(0, 1)

        def hook(module: nn.Module, *_: Any) -> None:
            nonlocal left
            if left == 0:
                raise InAHookError
            left -= 1

        block = self.draw.choice(list(self.model.blocks)[:-1])
        add = self.draw.choice([block.register_forward_hook, block.register_forward_pre_hook])
        handle = add(hook)
        try:
            with pytest.raises(InAHookError):
                self.reg(self.model, random_batch(self.draw), plain_loss)
        finally:
            handle.remove()

    def evaluate(self) -> None:
        self.model.eval()
        with torch.no_grad():
            self.reg(self.model, random_batch(self.draw), plain_loss)
        self.model.train()

    def copies(self) -> None:
        plain_loss(copy.deepcopy(self.model), random_batch(self.draw)).backward()
        plain_loss(pickle.loads(pickle.dumps(self.model)), random_batch(self.draw)).backward()

    def saves(self) -> None:
        buffer = io.BytesIO()
        torch.save([self.model, self.model.state_dict(), self.optimizer.state_dict(), self.reg.state_dict()], buffer)


@pytest.mark.filterwarnings("ignore::lfu_reg.LfUWarning")  # random tokens, in which there is nothing to learn
@pytest.mark.parametrize("name", AUXILIARIES)
def test_nothing_grows_over_500_steps(name: str) -> None:
    loop = Loop(name)
    loop.run(100)
    hooks, tensor_hooks = hook_counts(loop.model), tensor_hook_counts(loop.model)
    tensors, memory = live_tensors(), resident_bytes()
    loop.run(400)
    assert hook_counts(loop.model) == hooks
    assert tensor_hook_counts(loop.model) == tensor_hooks
    # Three detached scalars a step wait to be looked at by the diagnostics, for at most 50 steps.
    assert live_tensors() <= tensors + 3 * 50
    assert resident_bytes() <= memory + 12 * 2**20
    assert len(loop.events) == 5
    assert min(loop.events.values()) > 20, "each kind of event has to have happened"


class Run:
    """A run with accumulation over three micro-batches that can be saved between any two of them."""

    def __init__(self, name: str, dropout: float) -> None:
        self.model = seeded(lambda: TinyLM(dropout=dropout))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        fraction = 1.0 if dropout else 0.7  # a part of the batch cannot have the dropout of the whole
        self.reg = LfURegularizer(self.model, make_auxiliary(name), alpha=0.05, seed=7, batch_fraction=fraction)
        self.losses: list[float] = []

    def run(self, first: int, last: int) -> None:
        for micro in range(first, last):
            loss = self.reg(self.model, random_batch(random.Random(micro)), plain_loss)
            (loss / 3).backward()
            self.losses.append(float(loss.detach()))
            if micro % 3 == 2:
                self.optimizer.step()
                self.optimizer.zero_grad()

    def save(self) -> bytes:
        buffer = io.BytesIO()
        state = {
            "model": self.model.state_dict(),
            "gradients": [p.grad for p in self.model.parameters()],
            "optimizer": self.optimizer.state_dict(),
            "reg": self.reg.state_dict(),
            "random": torch.get_rng_state(),
        }
        torch.save(state, buffer)
        return buffer.getvalue()

    def load(self, saved: bytes) -> None:
        state = torch.load(io.BytesIO(saved), weights_only=True)
        self.model.load_state_dict(state["model"])
        for parameter, gradient in zip(self.model.parameters(), state["gradients"], strict=True):
            parameter.grad = gradient
        self.optimizer.load_state_dict(state["optimizer"])
        self.reg.load_state_dict(state["reg"])
        torch.set_rng_state(state["random"])


@pytest.mark.filterwarnings("ignore::lfu_reg.LfUWarning")
@pytest.mark.parametrize("at", [6, 13, 23], ids=["between updates", "after one micro-batch", "after two"])
@pytest.mark.parametrize("dropout", [0.0, 0.2], ids=["part of the batch", "dropout"])
@pytest.mark.parametrize("name", AUXILIARIES)
def test_resumed_bit_for_bit(name: str, dropout: float, at: int) -> None:
    torch.manual_seed(3)
    whole = Run(name, dropout)
    whole.run(0, at)
    saved = whole.save()
    whole.run(at, 36)

    torch.manual_seed(4)  # another process starts from somewhere else
    resumed = Run(name, dropout)
    resumed.run(0, 2)
    resumed.load(saved)
    resumed.losses.clear()
    resumed.run(at, 36)
    assert resumed.losses == whole.losses[at:]
    for got, want in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(got, want)


def trained(name: str, seed: int, model: nn.Module, meet: Callable[[], Any]) -> tuple[list[float], nn.Module]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg = LfURegularizer(model, make_auxiliary(name), alpha=0.05, seed=seed)
    losses = []
    for step in range(12):
        meet()
        loss = reg(model, token_batch(100 * seed + step), plain_loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, model


@pytest.mark.parametrize("name", AUXILIARIES)
def test_two_threads_with_separate_models(name: str) -> None:
    """Without random layers: torch's generator of random numbers is one for all threads."""
    alone = [trained(name, seed, seeded(TinyLM, seed), lambda: None) for seed in (1, 2)]
    models = {seed: seeded(TinyLM, seed) for seed in (1, 2)}
    barrier = threading.Barrier(2, timeout=60)
    together: dict[int, tuple[list[float], nn.Module]] = {}

    def work(seed: int) -> None:
        try:
            together[seed] = trained(name, seed, models[seed], barrier.wait)
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert set(together) == {1, 2}
    for seed, (losses, model) in zip((1, 2), alone, strict=True):
        assert together[seed][0] == losses
        for got, want in zip(together[seed][1].parameters(), model.parameters(), strict=True):
            assert torch.equal(got, want)
