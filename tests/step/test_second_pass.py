"""The loss function is called a second time: on an equal batch, under the same random state, and it has to repeat."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import BatchEncoding

from lfu_reg import LfURegularizer, LfUWarning
from tests.support.cases import Batch, Case, seeded
from tests.support.compare import assert_same_gradients, gradients_of
from tests.support.harness import run_pair
from tests.support.models import LLAMA, TINY
from tests.support.plain_models import TinyLM
from tests.support.snapshots import Snapshot

AUXILIARIES = ("lora", "steering", "weights", "random")
STRATEGIES = ("released", "retained")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", AUXILIARIES)
def test_it_is_called_exactly_twice_at_every_step(name: str, strategy: str) -> None:
    model, calls = TINY.make(), []

    def loss(m: Any, batch: Batch) -> Tensor:
        calls.append(reg.is_second_pass)
        return TINY.loss(m, batch)

    reg = LfURegularizer(model, name, strategy=strategy, alpha=0.05, lam=10.0)
    batch = TINY.batch()
    for step in range(101):
        calls.clear()
        reg(model, batch, loss)
        assert calls == [False, True], step
        assert not reg.is_second_pass


@pytest.mark.parametrize("steps", [2, 3])
def test_further_ascent_steps_call_it_once_each(steps: int) -> None:
    model, calls = TINY.make(), []
    reg = LfURegularizer(model, "steering", alpha=0.1, ascent_steps=steps)
    reg(model, TINY.batch(), lambda m, b: calls.append(reg.is_second_pass) or TINY.loss(m, b))
    assert calls == [False] + [True] * steps


@pytest.mark.parametrize("name", AUXILIARIES)
def test_every_call_finds_the_same_random_state(name: str) -> None:
    model, found = seeded(lambda: TinyLM(dropout=0.3)), []

    def draw() -> tuple[float, float, float]:
        return float(torch.rand(())), random.random(), float(np.random.rand())

    def loss(m: Any, batch: Batch) -> Tensor:
        found.append([draw()])
        value = TINY.loss(m, batch)
        if not reg.is_second_pass:
            after.append(draw())
        return value

    after: list[Any] = []
    reg = LfURegularizer(model, name, alpha=0.05, ascent_steps=2)
    reg(model, TINY.batch(), loss)
    assert found[0] == found[1] == found[2]
    assert draw() != after[0]
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    loss(model, TINY.batch())
    want = draw()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    reg(model, TINY.batch(), loss)
    assert draw() == want, "the caller's stream goes on as after one call"


# ------------------------------------------------------------------ batches


@dataclass
class Record:
    input_ids: Tensor
    labels: Tensor
    more: list[Any]


def as_dict(batch: Any) -> Batch:
    return {"input_ids": batch["input_ids"], "labels": batch["labels"]}


def popped(batch: Any) -> Batch:
    return {name: batch.pop(name) for name in ("input_ids", "labels")}


def popped_nested(batch: Any) -> Batch:
    return {"labels": batch[0].pop(), "input_ids": batch[0].pop()}


def from_record(batch: Any) -> Batch:
    labels, batch.labels = batch.labels, None
    return {"input_ids": batch.input_ids, "labels": labels, "popped": batch.more.pop()}


def from_iterator(batch: Any) -> Batch:
    return popped(next(batch)) | {"second": next(batch)}


def iterator(batch: Batch) -> Iterator[Any]:
    yield dict(batch)
    yield dict(batch)
    raise AssertionError("only two were asked for")


BATCHES: dict[str, tuple[Callable[[Batch], Any], Callable[[Any], Batch]]] = {
    "dict": (dict, popped),
    "BatchEncoding": (BatchEncoding, lambda b: {"input_ids": b.pop("input_ids"), "labels": b.pop("labels")}),
    "tuple": (lambda b: (b["input_ids"], b["labels"]), lambda b: {"input_ids": b[0], "labels": b[1]}),
    "nested lists": (lambda b: [[b["input_ids"], b["labels"]]], popped_nested),
    "dataclass": (lambda b: Record(b["input_ids"], b["labels"], [1]), from_record),
    "iterator": (iterator, from_iterator),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", BATCHES)
def test_containers_are_copied_for_the_second_call(kind: str, strategy: str) -> None:
    make, take = BATCHES[kind]
    options: dict[str, Any] = {"alpha": 0.05, "lam": 0.7, "strategy": strategy, "token_mask": lambda b: None}
    found, calls = [], []

    def loss(m: Any, batch: Any) -> Tensor:
        calls.append(id(batch))
        return TINY.loss(m, take(batch))

    mask = torch.ones(3, 7)
    for function, batch in ((loss, make(as_dict(TINY.batch()))), (TINY.loss, as_dict(TINY.batch()))):
        model = TINY.make()
        with LfURegularizer(model, "steering", **{**options, "token_mask": mask}) as reg:
            value = reg(model, batch, function)
            value.backward()
            assert float(reg.metrics["consistency_loss"]) > 0
        found.append((value.detach(), gradients_of(model)))
    assert len(set(calls)) == len(calls) == 2
    assert torch.equal(found[0][0], found[1][0])
    for key, gradient in found[0][1].items():
        assert torch.equal(gradient, found[1][1][key]), key


def test_what_is_written_into_the_batch_is_written_once() -> None:
    """Each step begins with what one call of the last one has left, and all of its calls see the same."""
    model = TINY.make()
    batch = {**TINY.batch(), "scale": torch.ones((), dtype=torch.float64)}
    seen: list[float] = []

    def loss(m: Any, b: Batch) -> Tensor:
        value = TINY.loss(m, b) * float(b["scale"])
        seen.append(float(b["scale"]))
        b["scale"].add_(1)
        return value

    with LfURegularizer(model, "steering", alpha=0.05) as reg:
        for step in range(3):
            reg(model, batch, loss)
            assert float(batch["scale"]) == step + 2
    assert seen == [1, 1, 2, 2, 3, 3]


# ------------------------------------------------------------------ what does not repeat


def with_own_counter() -> Callable[[Any, Batch], Tensor]:
    calls: list[int] = []

    def loss(m: Any, batch: Batch) -> Tensor:
        calls.append(1)
        return TINY.loss(m, {**batch, "input_ids": batch["input_ids"].roll(len(calls), 0)})

    return loss


def with_own_generator() -> Callable[[Any, Batch], Tensor]:
    noise = torch.Generator().manual_seed(3)
    orders = (torch.randperm(7, generator=noise) for _ in range(9))  # into which nobody can look

    def loss(m: Any, batch: Batch) -> Tensor:
        return TINY.loss(m, {**batch, "input_ids": batch["input_ids"][:, next(orders)]})

    return loss


def with_own_iterator() -> Callable[[Any, Batch], Tensor]:
    data = iter([TINY.batch(seed) for seed in range(9)])
    return lambda m, batch: TINY.loss(m, next(data))


def that_calls_once() -> Callable[[Any, Batch], Tensor]:
    calls: list[int] = []

    def loss(m: Any, batch: Batch) -> Tensor:
        calls.append(1)
        value = TINY.loss(m, batch)
        return value if len(calls) % 2 == 0 else value + TINY.loss(m, TINY.batch(7))

    return loss


FAILURES = {
    "counter": with_own_counter,
    "generator": with_own_generator,
    "iterator": with_own_iterator,
    "fewer calls": that_calls_once,
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", AUXILIARIES)
@pytest.mark.parametrize("kind", FAILURES)
def test_a_loss_that_does_not_repeat_is_plain_sft(kind: str, name: str, strategy: str) -> None:
    model, plain = TINY.make(), TINY.make()
    with LfURegularizer(model, name, alpha=0.05, strategy=strategy) as reg:
        with pytest.warns(LfUWarning, match="This step is plain SFT") as told:
            loss = reg(model, TINY.batch(), FAILURES[kind]())
        assert len(told) == 1
        loss.backward()
        assert reg.metrics["unrepeatable_steps"] == 1
        assert "ascent_grad_norm" not in reg.metrics
        assert torch.equal(reg.metrics["consistency_loss"], torch.zeros_like(loss)), "a loop may read it at every step"
    want = FAILURES[kind]()(plain, TINY.batch())
    want.backward()
    assert torch.equal(loss.detach(), want.detach())
    for key, gradient in gradients_of(plain).items():
        torch.testing.assert_close(dict(model.named_parameters())[key].grad, gradient, rtol=1e-12, atol=1e-15)


class TakesADictionary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, features: Any) -> Tensor:
        h = features["x"]
        for layer in self.layers:
            h = torch.tanh(layer(h))
        return h


@pytest.mark.parametrize("name", AUXILIARIES)
def test_a_batch_of_its_own_in_a_dictionary_is_plain_sft(name: str) -> None:
    """As sentence-transformers calls its models; moved weights would reach the input of every layer."""
    model, draws = TakesADictionary(), (torch.full((3, 4), n / 9) for n in range(1, 9))

    def loss(m: Any, batch: Any) -> Tensor:
        return m({"x": next(draws)}).square().mean()

    with LfURegularizer(model, name, alpha=0.05) as reg:
        with pytest.warns(LfUWarning, match="the input of the model's call 1 differs"):
            reg(model, {}, loss)
        assert reg.metrics["unrepeatable_steps"] == 1


# ------------------------------------------------------------------ exceptions, and what falls back


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", AUXILIARIES)
def test_an_exception_in_the_second_call_leaves_nothing(name: str, strategy: str, error: type[BaseException]) -> None:
    model = seeded(lambda: TinyLM(dropout=0.3, batch_norm=True))
    before, plain = Snapshot.of(model), copy.deepcopy(model)
    reg = LfURegularizer(model, name, strategy=strategy, alpha=0.05)

    def loss(m: Any, batch: Batch) -> Tensor:
        value = TINY.loss(m, batch)
        if reg.is_second_pass:
            raise error
        return value

    torch.manual_seed(4)
    with pytest.raises(error):
        reg(model, TINY.batch(), loss)
    after = torch.get_rng_state()
    before.check(model)
    assert not reg.is_second_pass
    assert torch.is_grad_enabled()
    torch.manual_seed(4)
    TINY.loss(plain, TINY.batch())
    assert torch.equal(after, torch.get_rng_state())
    for key, buffer in plain.named_buffers():
        assert torch.equal(buffer, dict(model.named_buffers())[key]), key
    reg(model, TINY.batch(), TINY.loss).backward()
    assert float(reg.metrics["consistency_loss"]) > 0


@pytest.mark.parametrize("name", ["lora", "steering", "weights"])
def test_code_after_the_layers_that_needs_a_graph(name: str) -> None:
    """What runs after the last layer is in no graph at first; where it fails for that, it is run with one."""
    calls: list[int] = []

    def loss(m: Any, batch: Batch) -> Tensor:
        calls.append(1)
        logits = m(batch["input_ids"])
        (slope,) = torch.autograd.grad(logits.square().mean(), logits, create_graph=True)
        return TINY.loss(lambda ids: logits, batch) + slope.square().sum()

    case = Case("slope", TINY.make, TINY.batch, loss, TINY.mask, TINY.layers, 6)
    pair = run_pair(case, name)
    pair.check()
    calls.clear()
    pair.reg(pair.model, TINY.batch(), loss)
    assert len(calls) == 2, "once that is known, it is not tried again"


class Inner(torch.autograd.Function):
    """Multiplies by a weight, whose gradient its backward writes to `.grad` by a `backward()` of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.x, ctx.weight = x.detach(), weight
        return x.detach() * weight.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        with torch.enable_grad():
            x = ctx.x.requires_grad_()
            (x * ctx.weight).backward(grad)
        return x.grad, None


class InnerLM(TinyLM):
    """The norm's weight takes part by a backward inside of a backward, or by the same operation in the graph."""

    hidden_in_a_function = True

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def body(self, hidden: Tensor) -> Tensor:
        hidden = Inner.apply(hidden, self.scale) if self.hidden_in_a_function else hidden * self.scale
        return super().body(hidden)


@pytest.mark.parametrize("before", [True, False], ids=["with gradients before", "without"])
@pytest.mark.parametrize("name", ["lora", "steering"])
def test_a_backward_inside_of_a_backward(name: str, before: bool) -> None:
    """What it writes to `.grad` is handed over with the rest, once, and what was there stays until then."""
    found = []
    for inside in (True, False):
        model = seeded(InnerLM)
        model.hidden_in_a_function = inside
        if before:
            model.scale.grad = torch.ones_like(model.scale)
        with LfURegularizer(model, name, alpha=0.05, lam=0.7, seed=1) as reg:
            loss = reg(model, TINY.batch(), TINY.loss)
            assert (model.scale.grad is not None) == before
            assert not before or model.scale.grad.tolist() == [1.0] * 8
            loss.backward()
        found.append(gradients_of(model))
    assert_same_gradients(*found)


@pytest.mark.parametrize("name", ["lora", "steering", "weights"])
def test_a_gradient_penalty(name: str) -> None:
    """The components take part in the gradient of the gradient, which no tap on the way of the first one sees."""

    def loss(m: Any, batch: Batch) -> Tensor:
        hidden = m.embed(batch["input_ids"]).detach().requires_grad_()
        value = TINY.loss(lambda ids: m.head(m.body(hidden)), batch)
        (slope,) = torch.autograd.grad(value, hidden, create_graph=True)
        return value + 100 * slope.square().sum()

    case = Case("penalty", TINY.make, TINY.batch, loss, TINY.mask, TINY.layers, 6)
    run_pair(case, name).check()


def test_hooks_are_on_the_model_for_a_step_only() -> None:
    model = LLAMA.make()
    bare = Snapshot.of(model)
    hooked: list[bool] = []

    def loss(m: Any, batch: Batch) -> Tensor:
        hooked.append(any(module._forward_hooks for module in m.modules()))
        return LLAMA.loss(m, batch)

    with LfURegularizer(model, "lora", alpha=0.1) as reg:
        bare.check(model)
        reg(model, LLAMA.batch(), loss).backward()
        bare.check(model, gradients=False)
    assert hooked == [True, True]


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_evaluations_of_a_closure_are_one_step(fraction: float) -> None:
    """A line search needs the same function at each point: LoRA's A and the samples are those of the first call."""
    model = TINY.make()
    reg = LfURegularizer(model, "lora", alpha=0.05, batch_fraction=fraction, seed=3)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.01, max_iter=3)
    drawn: list[tuple[int, Tensor]] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = reg(model, TINY.batch(2, shape=(4, 7)), TINY.loss)
        loss.backward()
        assert "ascent_grad_norm" in reg.metrics
        drawn.append((reg.state_dict()["step"], reg.perturbation["blocks.0.up"][0].clone()))
        return loss

    optimizer.step(closure)
    assert len(drawn) > 1
    assert {step for step, _ in drawn} == {1}
    assert all(torch.equal(a, drawn[0][1]) for _, a in drawn)
    first = len(drawn)
    optimizer.step(closure)
    assert drawn[first][0] == 2
    assert not torch.equal(drawn[first][1], drawn[0][1])


def test_a_dummy_loss_for_an_empty_batch_is_plain() -> None:
    """Loops return zero times all parameters there, so that every rank has a backward."""
    model = TINY.make()

    def loss(m: Any, batch: Batch) -> Tensor:
        if batch["input_ids"].numel() == 0:
            return sum(p.sum() for p in m.parameters()) * 0.0
        return TINY.loss(m, batch)

    empty = {"input_ids": torch.zeros(0, 7, dtype=torch.long), "labels": torch.zeros(0, 7, dtype=torch.long)}
    for order in ((empty, TINY.batch()), (TINY.batch(), empty)):
        with LfURegularizer(model, "steering") as reg:
            for batch in order:
                reg(model, batch, loss).backward()
                assert ("ascent_grad_norm" in reg.metrics) == (batch is not empty)


def test_modules_that_use_the_flag() -> None:
    """A hook that counts may ask which call it is in."""
    model, counts = TINY.make(), []
    reg = LfURegularizer(model, "steering")
    handle = model.blocks[0].register_forward_hook(lambda *_: None if reg.is_second_pass else counts.append(1))
    for _ in range(3):
        reg(model, TINY.batch(), TINY.loss)
    handle.remove()
    assert len(counts) == 3
    assert isinstance(model, nn.Module)
