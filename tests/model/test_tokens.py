"""Which tokens count: labels, else attention mask, else all; padding never matters; what the user says wins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BatchEncoding

from lfu_reg import LfURegularizer, SteeringVectors
from tests.support.architectures import VOCAB
from tests.support.cases import Case
from tests.support.compare import assert_same_gradients, close, gradients_of
from tests.support.harness import auxiliary, run_pair
from tests.support.models import LLAMA, T5, TINY

AUXILIARIES = ("lora", "steering", "weights")


def with_mask(case: Case, mask: Any) -> Case:
    return Case("", case.make, case.batch, case.loss, mask, case.layers, case.linears)


@pytest.mark.parametrize("name", AUXILIARIES)
def test_token_mask_as_a_tensor(name: str) -> None:
    mask = torch.rand(3, 7) > 0.5
    case = with_mask(LLAMA, lambda batch, layer: mask)
    run_pair(case, name, reg_options={"token_mask": mask}).check()
    run_pair(case, name, reg_options={"token_mask": mask.long()}).check()


@pytest.mark.parametrize("name", AUXILIARIES)
def test_token_mask_as_a_callable(name: str) -> None:
    def even(batch: Any) -> Tensor:
        return batch["input_ids"] % 2 == 0

    run_pair(with_mask(LLAMA, lambda batch, layer: even(batch)), name, reg_options={"token_mask": even}).check()


@pytest.mark.parametrize("name", AUXILIARIES)
def test_extra_padding_changes_nothing(name: str) -> None:
    batch = LLAMA.batch()
    padded = {
        "input_ids": torch.cat([batch["input_ids"], torch.randint(0, VOCAB, (3, 4))], 1),
        "attention_mask": torch.cat([batch["attention_mask"], torch.zeros(3, 4, dtype=torch.long)], 1),
        "labels": torch.cat([batch["labels"], torch.full((3, 4), -100)], 1),
    }
    found = []
    for given in (batch, padded):
        model = LLAMA.make()
        reg = LfURegularizer(model, auxiliary(name), alpha=0.05, lam=0.7, seed=3)
        loss = reg(model, given, LLAMA.loss)
        loss.backward()
        found.append((loss.detach(), gradients_of(model)))
    close(found[1][0], found[0][0], 1e-10)
    assert_same_gradients(found[1][1], found[0][1], 1e-8)


@pytest.mark.parametrize("name", AUXILIARIES)
def test_encoder_and_decoder_of_the_same_length(name: str) -> None:
    """Labels belong to the decoder; the encoder goes by the attention mask also where the shapes would fit."""
    source, target = LLAMA.batch(3), LLAMA.batch(4)
    batch = {
        "input_ids": source["input_ids"],
        "attention_mask": source["attention_mask"],
        "labels": target["labels"],
    }
    assert batch["labels"].shape == batch["attention_mask"].shape
    run_pair(T5, name, batch=batch).check()


@pytest.mark.parametrize("name", AUXILIARIES)
def test_lengths_that_change_from_step_to_step(name: str) -> None:
    model = TINY.make()
    reg = LfURegularizer(model, auxiliary(name), alpha=0.05, lam=0.7, seed=3)
    for shape in ((3, 7), (2, 5), (4, 9), (1, 6), (3, 7)):
        model.zero_grad()
        batch = TINY.batch(2, shape=shape)
        loss = reg(model, batch, TINY.loss)
        loss.backward()
        if name != "lora":
            fresh = TINY.make()
            with LfURegularizer(fresh, auxiliary(name), alpha=0.05, lam=0.7) as other:
                expected = other(fresh, batch, TINY.loss)
            assert torch.equal(loss.detach(), expected.detach())


@pytest.mark.parametrize("name", AUXILIARIES)
def test_time_first(name: str) -> None:
    """Hidden states [tokens, batch, hidden] with labels [batch, tokens]."""

    class TimeFirst(type(TINY.make())):  # type: ignore[misc]
        def body(self, hidden: Tensor) -> Tensor:
            hidden = hidden.transpose(0, 1)
            steps = torch.arange(1, hidden.shape[0] + 1, dtype=hidden.dtype)
            for block in self.blocks:
                hidden = block(hidden.cumsum(0) / steps[:, None, None])
            return self.norm(hidden.transpose(0, 1).flatten(0, 1)).view(hidden.shape[1], hidden.shape[0], -1)

    def make() -> Any:
        model = TINY.make()
        model.__class__ = TimeFirst
        return model

    case = Case("", make, TINY.batch, TINY.loss, lambda batch, layer: (batch["labels"] != -100).T, TINY.layers, 6)
    run_pair(case, name).check()


def as_tuple(batch: Any) -> Any:
    return (batch["input_ids"], batch["labels"])


class Record:
    def __init__(self, batch: Any) -> None:
        self.input_ids, self.labels = batch["input_ids"], batch["labels"]


BATCH_TYPES = {
    "tuple": (as_tuple, lambda m, b: TINY.loss(m, {"input_ids": b[0], "labels": b[1]}), TINY.mask),
    "BatchEncoding": (lambda b: BatchEncoding(dict(b)), TINY.loss, TINY.mask),
    "object": (Record, lambda m, b: TINY.loss(m, {"input_ids": b.input_ids, "labels": b.labels}), TINY.mask),
}


@pytest.mark.parametrize("kind", BATCH_TYPES)
def test_kinds_of_batches(kind: str) -> None:
    """A mapping and an object with a `labels` attribute are looked into; of a tuple the second entry are the labels."""
    convert, loss_fn, mask = BATCH_TYPES[kind]
    model, batch = TINY.make(), TINY.batch()
    reg = LfURegularizer(model, SteeringVectors(), alpha=0.05, lam=0.7)
    loss = reg(model, convert(batch), loss_fn)
    expected = run_pair(with_mask(TINY, mask), "steering").want.loss
    close(loss.detach(), expected)


def test_one_sample_and_one_token() -> None:
    batch = TINY.batch(2, shape=(1, 7))
    run_pair(TINY, "steering", batch=batch).check()
    lonely = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    lonely["labels"][0, 4] = 3
    run_pair(TINY, "lora", batch=lonely).check()


def test_steering_leaves_other_tokens_alone() -> None:
    """In the layer where d_l is added; later layers mix tokens."""
    model, seen = TINY.make(), []
    reg = LfURegularizer(model, "steering")
    watch = model.blocks[0].register_forward_hook(lambda m, a, out: seen.append(out.detach().clone()))
    batch = TINY.batch()
    reg(model, batch, TINY.loss)
    watch.remove()
    moved = (seen[-1] - seen[0]).abs().sum(-1) > 0  # pass 2 comes last
    assert torch.equal(moved, batch["labels"] != -100)


def test_steps_without_a_token_that_counts_are_counted() -> None:
    model = TINY.make()
    empty = {**TINY.batch(), "labels": TINY.batch()["labels"].clone()}
    with LfURegularizer(model, "lora", token_mask=lambda batch: batch["labels"] > 10**6) as reg:
        reg(model, empty, TINY.loss)
        reg(model, empty, TINY.loss)
        assert reg.metrics["empty_steps"] == 2
        assert float(reg.metrics["consistency_loss"]) == 0
    with LfURegularizer(model, "lora") as reg:
        reg(model, TINY.batch(), TINY.loss)
        assert reg.metrics["empty_steps"] == 0
