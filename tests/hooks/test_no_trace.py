"""The regularizer leaves no trace: in hooks, outputs, names, pickles, batches, flags and random numbers."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor

from lfu_reg import LfURegularizer
from tests.support.cases import seeded
from tests.support.compare import gradients_of
from tests.support.harness import auxiliary
from tests.support.models import LLAMA, PEFT, T5, TIED, TINY
from tests.support.plain_models import TinyLM
from tests.support.snapshots import Snapshot

AUXILIARIES = ("lora", "steering", "weights", "random")
STRATEGIES = ("released", "retained")


def make_auxiliary(name: str) -> Any:
    return name if name == "random" else auxiliary(name)


def noisy_model() -> TinyLM:
    return seeded(lambda: TinyLM(dropout=0.3, batch_norm=True))


@pytest.mark.parametrize("case", [LLAMA, PEFT, T5, TINY], ids=lambda c: c.name)
@pytest.mark.parametrize("name", AUXILIARIES)
def test_remove(case: Any, name: str) -> None:
    model = case.make()
    before = Snapshot.of(model)
    reg = LfURegularizer(model, make_auxiliary(name))
    reg(model, case.batch(), case.loss)
    reg.remove()
    before.check(model)
    reg.remove()
    before.check(model)


@pytest.mark.parametrize("name", AUXILIARIES)
def test_context_manager(name: str) -> None:
    model = TINY.make()
    before = Snapshot.of(model)
    with LfURegularizer(model, make_auxiliary(name)) as reg:
        assert isinstance(reg, LfURegularizer)
        reg(model, TINY.batch(), TINY.loss)
    before.check(model)
    with pytest.raises(ZeroDivisionError), LfURegularizer(model, make_auxiliary(name)):
        _ = 1 / 0
    before.check(model)


def test_attach_again_after_remove() -> None:
    model = TINY.make()
    LfURegularizer(model, "steering").remove()
    with LfURegularizer(model, "lora") as reg:
        assert float(reg(model, TINY.batch(), TINY.loss).detach()) > 0


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", AUXILIARIES)
def test_a_step_changes_nothing_before_backward(name: str, strategy: str) -> None:
    model = noisy_model()
    for parameter in list(model.parameters())[::2]:
        parameter.grad = torch.randn_like(parameter)
    model.blocks[0].drop.eval()  # mixed training flags stay mixed
    reg = LfURegularizer(model, make_auxiliary(name), strategy=strategy)
    before = Snapshot.of(model)
    loss = reg(model, TINY.batch(), TINY.loss)
    before.check(model)
    assert loss.shape == ()
    assert loss.requires_grad
    loss.backward()
    before.check(model, gradients=False)


@pytest.mark.parametrize("case", [LLAMA, PEFT, TIED, TINY], ids=lambda c: c.name)
@pytest.mark.parametrize("name", AUXILIARIES)
def test_outputs_names_and_state_outside_of_a_step(case: Any, name: str) -> None:
    model, plain = case.make(), case.make()
    reg = LfURegularizer(model, make_auxiliary(name))
    reg(model, case.batch(), case.loss)
    for training in (True, False):
        model.train(training), plain.train(training)
        assert torch.equal(case.loss(model, case.batch()), case.loss(plain, case.batch()))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
    assert [n for n, _ in model.named_buffers()] == [n for n, _ in plain.named_buffers()]
    case.loss(model.train(), case.batch()).backward()
    case.loss(plain.train(), case.batch()).backward()
    for got, want in zip(gradients_of(model).values(), gradients_of(plain).values(), strict=True):
        assert (got is None) == (want is None)
        assert got is None or torch.equal(got, want)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", AUXILIARIES)
def test_random_state_after_a_step_is_that_of_plain_sft(name: str, strategy: str) -> None:
    model = noisy_model()
    torch.manual_seed(6)
    TINY.loss(noisy_model(), TINY.batch())
    state = torch.get_rng_state()
    reg = LfURegularizer(model, make_auxiliary(name), strategy=strategy)
    torch.manual_seed(6)
    loss = reg(model, TINY.batch(), TINY.loss)
    assert torch.equal(torch.get_rng_state(), state)
    loss.backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_attaching_draws_nothing() -> None:
    model = TINY.make()
    state = torch.get_rng_state()
    with LfURegularizer(model, "lora"):
        pass
    assert torch.equal(torch.get_rng_state(), state)


def saved_and_loaded(model: torch.nn.Module) -> torch.nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("case", [LLAMA, TINY], ids=lambda c: c.name)
@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("name", AUXILIARIES)
@pytest.mark.parametrize("live", [False, True], ids=["idle", "live loss"])
def test_copies_of_an_attached_model(case: Any, copied: Any, name: str, live: bool) -> None:
    """A copy works, is not regularized, and running it disturbs the original in nothing."""
    model = case.make()
    reg = LfURegularizer(model, make_auxiliary(name), seed=3)
    loss = reg(model, case.batch(), case.loss)
    if not live:
        loss.backward()
        model.zero_grad()
    twin = copied(model)
    metrics = {key: float(value) for key, value in reg.metrics.items()}
    sft = case.loss(twin, case.batch(5))
    sft.backward()
    assert torch.equal(sft.detach(), case.loss(case.make(), case.batch(5)).detach())
    assert {key: float(value) for key, value in reg.metrics.items()} == metrics
    assert all(p.grad is None for p in model.parameters())
    reg(model, case.batch(), case.loss).backward()
    assert all(p.grad is not None for p in model.parameters())
    with LfURegularizer(twin, make_auxiliary(name)) as second:  # the copy is free to be attached
        second(twin, case.batch(), case.loss)
    reg.remove()


def test_a_copy_running_inside_a_step_disturbs_nothing() -> None:
    """As an EMA teacher does: the loss function runs a copy made while attached."""
    model = TINY.make()
    alone = LfURegularizer(model, "steering")
    expected = alone(model, TINY.batch(), TINY.loss).detach()
    alone.remove()
    reg = LfURegularizer(model, "steering")
    teacher = copy.deepcopy(model)

    def loss(module: Any, batch: Any) -> Tensor:
        with torch.no_grad():
            TINY.loss(teacher, batch)
        return TINY.loss(module, batch)

    assert torch.equal(reg(model, TINY.batch(), loss).detach(), expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", AUXILIARIES)
def test_batch_is_not_mutated_and_the_loss_function_runs_twice(name: str, strategy: str) -> None:
    model, calls = TINY.make(), []
    reg = LfURegularizer(model, make_auxiliary(name), alpha=0.1, strategy=strategy)
    batch = TINY.batch()
    kept = {key: value.clone() for key, value in batch.items()}
    objects = dict(batch)

    def loss(module: Any, given: Any) -> Tensor:
        calls.append(given)
        return TINY.loss(module, given)

    reg(model, batch, loss).backward()
    assert len(calls) == 2
    assert batch.keys() == kept.keys()
    assert all(batch[key] is objects[key] and torch.equal(batch[key], kept[key]) for key in kept)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", AUXILIARIES)
def test_a_loss_function_may_pop_from_the_batch(name: str, strategy: str) -> None:
    model, calls = TINY.make(), []
    reg = LfURegularizer(model, make_auxiliary(name), alpha=0.1, strategy=strategy, seed=5)

    def popping(module: Any, batch: Any) -> Tensor:
        calls.append(1)
        labels = batch.pop("labels")
        return TINY.loss(module, {"input_ids": batch.pop("input_ids"), "labels": labels})

    loss = reg(model, TINY.batch(), popping).detach()
    twin = TINY.make()
    untouched = LfURegularizer(twin, make_auxiliary(name), alpha=0.1, strategy=strategy, seed=5)
    assert torch.equal(loss, untouched(twin, TINY.batch(), TINY.loss).detach())
    assert len(calls) == 2


@pytest.mark.filterwarnings("ignore::lfu_reg.LfUWarning")  # eval mode in a training step deserves a word
@pytest.mark.parametrize("name", AUXILIARIES)
def test_eval_and_no_grad_return_the_plain_loss(name: str) -> None:
    model, calls = TINY.make(), []
    reg = LfURegularizer(model, make_auxiliary(name))
    counter = model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    plain = TINY.loss(TINY.make(), TINY.batch()).detach()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            loss = reg(model, TINY.batch(), TINY.loss)
        assert torch.equal(loss, plain)
        assert not loss.requires_grad
        assert len(calls) == 1
        calls.clear()
    model.eval()
    loss = reg(model, TINY.batch(), TINY.loss)
    assert torch.equal(loss.detach(), plain)
    assert len(calls) == 1
    loss.backward()  # the ordinary graph: somebody may want it
    assert model.head.weight.grad is not None
    counter.remove()
    model.train()
    reg(model, TINY.batch(), TINY.loss)
    assert float(reg.metrics["consistency_loss"]) > 0


@pytest.mark.parametrize("name", AUXILIARIES)
def test_disabled(name: str) -> None:
    model, calls = TINY.make(), []
    reg = LfURegularizer(model, make_auxiliary(name))
    model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    with reg.disabled():
        loss = reg(model, TINY.batch(), TINY.loss)
        with reg.disabled():
            pass
        again = reg(model, TINY.batch(), TINY.loss)  # nesting keeps the outer one
    assert len(calls) == 2
    plain = TINY.loss(TINY.make(), TINY.batch()).detach()
    assert torch.equal(loss.detach(), plain)
    assert torch.equal(again.detach(), plain)
    with pytest.raises(ZeroDivisionError), reg.disabled():
        _ = 1 / 0
    calls.clear()
    reg(model, TINY.batch(), TINY.loss)
    assert len(calls) >= 2
    assert float(reg.metrics["consistency_loss"]) > 0
