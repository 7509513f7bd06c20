"""Scores of a model: losses and accuracies of answers, and the divergence from the base model on its own answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from lfu_reg.cli.compare.encoding import IGNORED, Tokens, by_length, collate

BATCH = 8  # rows of a forward pass


@torch.no_grad()
def score(model: Any, sequences: Sequence[Tokens], pad: int, device: str) -> dict[str, float]:
    """Loss per token of the answers, and what greedy decoding would do.

    It yields exactly an answer if and only if each token of the answer, the end token included, is the arg max given
    the answer before it, so exact matches need one forward pass and no decoding.

    Returns:
        loss: mean negative log-likelihood per token of an answer, nats.
        token_accuracy: share of the answers' tokens that are the arg max.
        exact: share of the answers that greedy decoding gives word for word.
    """
    loss = right = tokens = exact = 0.0
    for places in by_length(sequences, BATCH):
        for logits, targets in _answers(model, [sequences[place] for place in places], pad, device):
            hits = logits.argmax(-1) == targets
            loss += float(cross_entropy(logits, targets, reduction="sum"))
            right += int(hits.sum())
            exact += bool(hits.all())
            tokens += len(targets)
    return {"loss": loss / tokens, "token_accuracy": right / tokens, "exact": exact / len(sequences)}


@torch.no_grad()
def log_probabilities(model: Any, sequences: Sequence[Tokens], pad: int, device: str) -> list[Tensor]:
    """Of the next token over the vocabulary, [tokens of the answer, vocabulary], one tensor per sequence."""
    found = [torch.empty(0)] * len(sequences)
    for places in by_length(sequences, BATCH):
        answers = _answers(model, [sequences[place] for place in places], pad, device)
        for place, (logits, _) in zip(places, answers, strict=True):
            found[place] = logits.log_softmax(-1)
    return found


def divergence(base: Sequence[Tensor], own: Sequence[Tensor]) -> float:
    """KL(base || own) per token, nats: over answers that the base model drew, the forward divergence from it."""
    total = sum(float(kl_div(mine, was, reduction="sum", log_target=True)) for was, mine in zip(base, own, strict=True))
    return total / sum(len(was) for was in base)


def _answers(model: Any, sequences: Sequence[Tokens], pad: int, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits [tokens, vocabulary] and targets [tokens] of each answer."""
    batch = collate(sequences, pad, device)
    labels = batch.pop("labels")[:, 1:]
    logits = model(**batch, use_cache=False).logits[:, :-1]
    for row, of_row in zip(logits, labels, strict=True):
        counted = of_row != IGNORED
        yield row[counted].float(), of_row[counted]
