"""Scores: exact matches, token accuracy and perplexity, all from one forward pass per batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from demo.data import IGNORED, batches_by_length, encode
from demo.skills import Example


@dataclass(frozen=True)
class Scores:
    """What a model makes of a list of examples."""

    exact: float  # share of examples whose whole response is what greedy decoding gives
    token_accuracy: float  # share of response tokens that are the arg max, given the reference before them
    loss: float  # mean negative log-likelihood per response token

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))


@torch.no_grad()
def score(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
    max_length: int = 512,
    batch_size: int = 64,
    ends: bool = True,
) -> Scores:
    """Scores the responses of the examples.

    Greedy decoding yields exactly the reference if and only if each token of the reference, the end token
    included, is the arg max given the reference before it. So exact match needs one forward pass, not a
    decoding loop.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    rows = [encode(tokenizer, example, max_length, ends) for example in examples]
    exact = correct = tokens = 0
    loss = 0.0
    for batch in batches_by_length(rows, batch_size, tokenizer.pad_token_id, device):
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch, use_cache=False).logits[:, :-1].float()
        counted = labels != IGNORED
        hits = (logits.argmax(-1) == labels) & counted
        exact += int((hits == counted).all(dim=1).sum())
        correct += int(hits.sum())
        tokens += int(counted.sum())
        loss += float(cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="sum"))
    model.train(was_training)
    return Scores(exact / len(rows), correct / tokens, loss / tokens)
