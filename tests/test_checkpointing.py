"""Activation checkpointing: non-reentrant gives the same gradients, reentrant is refused with the cure."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lfu_reg import LfURegularizer
from tests.cases import Case, seeded
from tests.compare import assert_same_gradients, gradients_of
from tests.harness import auxiliary
from tests.models import BERT, GPT2, LLAMA, PEFT, T5, TINY
from tests.plain_models import TinyLM

AUXILIARIES = ("lora", "steering", "weights", "random")


class CheckpointedLM(TinyLM):
    """Every block is run by hand through checkpoint, so that all hooks in and on it are inside the region."""

    use_reentrant = False

    def body(self, hidden: Tensor) -> Tensor:
        for block in self.blocks:
            hidden = checkpoint(block, hidden, use_reentrant=self.use_reentrant)
        return self.norm(hidden.flatten(0, 1)).view_as(hidden)


class PlainLM(CheckpointedLM):
    def body(self, hidden: Tensor) -> Tensor:
        for block in self.blocks:
            hidden = block(hidden)
        return self.norm(hidden.flatten(0, 1)).view_as(hidden)


def gradients(model: nn.Module, case: Case, name: str, **options: Any) -> tuple[Tensor, dict[str, Tensor | None]]:
    aux = name if name == "random" else auxiliary(name)
    torch.manual_seed(7)
    with LfURegularizer(model, aux, alpha=0.05, lam=0.7, seed=3, **options) as reg:
        loss = reg(model, case.batch(), case.loss)
        loss.backward()
    return loss.detach(), gradients_of(model)


@pytest.mark.parametrize("case", [LLAMA, PEFT, GPT2, T5, BERT], ids=lambda c: c.name)
@pytest.mark.parametrize("name", AUXILIARIES)
def test_transformers_checkpointing(case: Case, name: str) -> None:
    model = case.make()
    plain = copy.deepcopy(model)
    if case is PEFT:
        model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss, got = gradients(model, case, name, strategy="released")
    expected_loss, want = gradients(plain, case, name, strategy="released")
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-12)
    assert_same_gradients(got, want)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("name", AUXILIARIES)
def test_checkpointing_by_hand(name: str, steps: int, dropout: float) -> None:
    got_loss, got = gradients(
        seeded(lambda: CheckpointedLM(dropout=dropout)), TINY, name, strategy="released", ascent_steps=steps
    )
    want_loss, want = gradients(
        seeded(lambda: PlainLM(dropout=dropout)), TINY, name, strategy="released", ascent_steps=steps
    )
    assert float(got_loss) == pytest.approx(float(want_loss), rel=1e-12)
    assert_same_gradients(got, want)


@pytest.mark.parametrize("options", [{"strategy": "retained"}, {"stop_gradient": "none"}], ids=["retained", "none"])
@pytest.mark.parametrize("name", AUXILIARIES)
def test_a_retained_graph_under_checkpointing_is_right_or_refused(name: str, options: Any) -> None:
    """The user's backward recomputes blocks when the step is long over: never silently wrong."""
    _, want = gradients(seeded(PlainLM), TINY, name, **options)
    try:
        _, got = gradients(seeded(CheckpointedLM), TINY, name, **options)
    except (RuntimeError, ValueError) as error:
        assert "checkpoint" in str(error).lower()  # noqa: PT017
    else:
        assert_same_gradients(got, want)


@pytest.mark.parametrize("name", AUXILIARIES)
def test_backward_in_another_thread(name: str) -> None:
    model = seeded(CheckpointedLM)
    aux = name if name == "random" else auxiliary(name)
    reg = LfURegularizer(model, aux, alpha=0.05, lam=0.7, seed=3)
    torch.manual_seed(7)
    loss = reg(model, TINY.batch(), TINY.loss)
    worker = threading.Thread(target=loss.backward)
    worker.start()
    worker.join()
    _, want = gradients(seeded(PlainLM), TINY, name)
    assert_same_gradients(gradients_of(model), want)


class ReentrantLM(CheckpointedLM):
    use_reentrant = True


@pytest.mark.parametrize("strategy", ["auto", "released", "retained"])
@pytest.mark.parametrize("name", AUXILIARIES)
def test_reentrant_by_hand_is_refused(name: str, strategy: str) -> None:
    model = seeded(ReentrantLM)
    reg = LfURegularizer(model, name if name == "random" else auxiliary(name), strategy=strategy)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        reg(model, TINY.batch(), TINY.loss)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", AUXILIARIES)
def test_reentrant_in_transformers_is_refused(name: str) -> None:
    model = LLAMA.make()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    reg = LfURegularizer(model, name if name == "random" else auxiliary(name))
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        reg(model, LLAMA.batch(), LLAMA.loss)
    assert all(p.grad is None for p in model.parameters())
