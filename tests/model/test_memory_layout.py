"""What a model does with the memory of its activations does not change what the regularizer measures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.cases import Case, seeded, token_batch
from tests.support.harness import run_pair

VOCAB, WIDTH = 13, 8


class TimeFirstLM(nn.Module):
    """Blocks on [tokens, batch, hidden] with dropout right after each, which draws in the order of memory."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3))
        self.drop = nn.Dropout(0.4)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids).transpose(0, 1).contiguous()
        for block in self.blocks:
            hidden = self.drop(block(hidden))
        return self.head(hidden).transpose(0, 1)


class InPlaceLM(nn.Module):
    """Linear maps on [batch, tokens, hidden], whose outputs are views, with in-place activations after them."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 12), nn.ReLU(inplace=True), nn.Linear(12, WIDTH)) for _ in range(depth)
        )
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = F.silu(block(hidden), inplace=True)
        return self.head(hidden)


def next_token(model: Any, batch: Mapping[str, Any]) -> Tensor:
    logits = model(batch["input_ids"])
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)


def mask(batch: Mapping[str, Any], layer: str) -> Tensor:
    return batch["labels"] != -100


def case(make: Any, mask: Any) -> Case:
    layers = tuple(f"blocks.{i}" for i in range(3))
    return Case(make.__name__, lambda: seeded(make), token_batch, next_token, mask, layers, 0)


@pytest.mark.parametrize("relative", [False, True])
def test_steering_keeps_the_strides_that_dropout_draws_by(relative: bool) -> None:
    time_first = case(TimeFirstLM, lambda batch, layer: mask(batch, layer).t())
    run_pair(time_first, "steering", aux_options={"relative": relative}, seed=3).check()


@pytest.mark.parametrize("name", ["lora", "steering", "weights"])
@pytest.mark.parametrize("strategy", ["released", "retained"])
def test_in_place_operations_on_views(name: str, strategy: str) -> None:
    pair = run_pair(case(InPlaceLM, mask), name, reg_options={"strategy": strategy})
    if name == "lora":
        assert all(bool(b.any()) for _, b in pair.reg.perturbation.values()), "a tap was lost"
    pair.check()
