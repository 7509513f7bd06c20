"""Gradient accumulation in hand-written loops, as docs/gotchas/gradient-accumulation.md has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfu_reg import LfURegularizer
from tests.support.cases import Batch, token_batch
from tests.support.compare import assert_same_gradients, gradients_of
from tests.support.harness import auxiliary
from tests.support.models import LLAMA, TINY

STRATEGIES = ("released", "retained")
AUXILIARIES = ("lora", "steering", "weights")
DIRECTION = token_batch(11)  # the ascent takes its direction from this batch, so that it is the same for any division


def attach(model: nn.Module, name: str, strategy: str = "released") -> LfURegularizer:
    return LfURegularizer(model, auxiliary(name), alpha=0.05, lam=0.7, seed=3, strategy=strategy)


def same_step(reg: LfURegularizer) -> None:
    """Micro-batches are steps of their own, for which LoRA draws another A: here they get the same one."""
    reg.load_state_dict({"step": 0, "seed": 3})


def divided(batch: Mapping[str, Tensor], sizes: Sequence[int]) -> list[Batch]:
    parts = {key: value.split(list(sizes)) for key, value in batch.items()}
    return [{key: value[i] for key, value in parts.items()} for i in range(len(sizes))]


def equal_lengths() -> Batch:
    batch = token_batch(5, shape=(6, 7), labels=False)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    # The first token is no response token, so that each hidden state that counts is one that the loss asks for.
    labels = batch["input_ids"].clone()
    labels[:, 0] = -100
    return {**batch, "labels": labels}


@pytest.mark.parametrize("together", [False, True], ids=["one-by-one", "summed"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", AUXILIARIES)
def test_equal_micro_batches_divided_by_their_number(name: str, strategy: str, together: bool) -> None:
    big = equal_lengths()
    model, whole = TINY.make(), TINY.make()
    attach(whole, name, strategy)(whole, big, TINY.loss, undesirable=DIRECTION).backward()

    reg, losses = attach(model, name, strategy), []
    for micro in divided(big, [2, 2, 2]):
        same_step(reg)
        loss = reg(model, micro, TINY.loss, undesirable=DIRECTION) / 3
        if together:
            losses.append(loss)
        else:
            loss.backward()
    if together:
        torch.stack(losses).sum().backward()
    assert_same_gradients(gradients_of(model), gradients_of(whole))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", AUXILIARIES)
def test_each_micro_batch_has_a_direction_of_its_own(name: str, strategy: str) -> None:
    """Without `undesirable` the sum is that of steps with an undesirable self each, not that of the big batch."""
    parts = divided(equal_lengths(), [2, 2, 2])
    model, reg_model = TINY.make(), TINY.make()
    reg = attach(reg_model, name, strategy)
    for micro in parts:
        (reg(reg_model, micro, TINY.loss) / 3).backward()
    for step, micro in enumerate(parts):
        with attach(model, name, strategy) as single:
            single.load_state_dict({"step": step, "seed": 3})
            (single(model, micro, TINY.loss) / 3).backward()
    assert_same_gradients(gradients_of(reg_model), gradients_of(model))


def tokens_of(batch: Mapping[str, Tensor]) -> int:
    return int((batch["labels"] != -100).sum())


@pytest.mark.parametrize("name", ["steering", "weights"])
def test_weighting_the_whole_loss_by_its_tokens(name: str) -> None:
    """Micro-batches of unequal length: the loss function returns a mean, and the whole loss is weighted."""
    big = token_batch(5, shape=(6, 9))
    model, whole = LLAMA.make(), LLAMA.make()
    options = {"undesirable": DIRECTION}
    attach(whole, name)(whole, big, LLAMA.loss, **options).backward()

    reg, total = attach(model, name), tokens_of(big)
    for micro in divided(big, [1, 3, 2]):
        loss = reg(model, micro, LLAMA.loss, **options) * (tokens_of(micro) / total)
        loss.backward()
    assert_same_gradients(gradients_of(model), gradients_of(whole))


@pytest.mark.parametrize("name", ["steering", "weights"])
def test_a_sum_over_all_tokens_with_lam_of_the_micro_batch(name: str) -> None:
    """The loss function divides by the tokens of all micro-batches: then lam has to carry their share."""
    big = token_batch(5, shape=(6, 9))
    model, whole, total = LLAMA.make(), LLAMA.make(), tokens_of(big)
    options = {"undesirable": DIRECTION}
    attach(whole, name)(whole, big, LLAMA.loss, **options).backward()

    def loss(m: Any, batch: Mapping[str, Tensor]) -> Tensor:
        logits = m(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        targets = batch["labels"][:, 1:].flatten()
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=-100, reduction="sum") / total

    share = 0.0
    reg = LfURegularizer(model, auxiliary(name), alpha=0.05, lam=lambda step: 0.7 * share, seed=3)
    for micro in divided(big, [1, 3, 2]):
        share = tokens_of(micro) / total
        reg(model, micro, loss, **options).backward()
    assert_same_gradients(gradients_of(model), gradients_of(whole))
