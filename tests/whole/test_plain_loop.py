"""Loops written by hand: accumulation weighted by token counts, clipping, and a loss divided before the backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lfu_reg import LfURegularizer
from tests.support.cases import seeded
from tests.support.compare import assert_same_gradients, gradients_of, mismatch
from tests.support.loops import FIXED
from tests.support.plain_models import TinyLM

VOCAB = 13


def rows(lengths: tuple[int, ...]) -> list[dict[str, Tensor]]:
    """Rows of a two-token prompt and answers of different lengths, padded on the right."""
    generator = torch.Generator().manual_seed(4)
    made = []
    for length in lengths:
        ids = torch.randint(VOCAB, (1, max(lengths)), generator=generator)
        position = torch.arange(max(lengths))
        labels = ids.masked_fill((position < 2) | (position >= length), -100)
        made.append({"input_ids": ids, "labels": labels})
    return made


def mean_loss(model: Any, batch: Any) -> Tensor:
    logits = model(batch["input_ids"])[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)


def tokens_in(batch: dict[str, Tensor]) -> Tensor:
    return (batch["labels"][:, 1:] != -100).sum().double()


def accumulated(
    batches: list[dict[str, Tensor]], *, by_tokens: bool = True, lam: float = FIXED["lam"]
) -> dict[str, Any]:
    model = seeded(lambda: TinyLM(VOCAB))
    total = sum(tokens_in(batch) for batch in batches)
    with LfURegularizer(model, **{**FIXED, "lam": lam}) as reg:
        for batch in batches:
            weight = tokens_in(batch) / total if by_tokens else 1 / len(batches)
            (reg(model, batch, mean_loss) * weight).backward()
    return gradients_of(model)


def test_weights_by_token_counts_make_parts_the_whole() -> None:
    parts = rows((3, 5, 8, 7))
    whole = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    want = accumulated([whole])
    assert_same_gradients(accumulated(parts), want, 1e-9)
    assert mismatch(accumulated(parts, by_tokens=False), want)[0] > 1e-3
    assert mismatch(accumulated(parts, lam=0.0), want)[0] > 1e-3
