"""What a test needs to know about a model: how to make it, a batch, its loss, and which tokens of which layer count."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = dict[str, Any]
Loss = Callable[[Any, Mapping[str, Any]], Tensor]
Mask = Callable[[Mapping[str, Any], str], "Tensor | None"]


@dataclass(frozen=True)
class Case:
    """One model of the zoo.

    Attributes:
        name: for test ids.
        make: a fresh model with random weights, float64, in training mode.
        batch: a fresh batch; `batch(seed)` gives different ones.
        loss: the user's sft_loss_fn.
        mask: (batch, layer name) -> the tokens that count by the contract's default; None where all do.
        layers: the blocks that layers="all" has to find.
        linears: how many linear maps "all-linear" has to find; 0 where LoRA has nothing to act on.
        channel_axis: the hidden axis of the layers' outputs.
    """

    name: str
    make: Callable[[], nn.Module]
    batch: Callable[..., Batch]
    loss: Loss
    mask: Mask
    layers: tuple[str, ...]
    linears: int
    channel_axis: int | Callable[[str], int] = -1
    auxiliaries: tuple[str, ...] = field(default=("lora", "steering", "weights"))


def seeded(make: Callable[[], nn.Module], seed: int = 1) -> nn.Module:
    """`make()` from a fixed seed, in float64 and training mode, with every weight moved off its initial zero or one."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make().double().train()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def token_batch(seed: int = 2, *, vocab: int = 13, shape: tuple[int, int] = (3, 7), labels: bool = True) -> Batch:
    """Token ids, a right-padding mask, and labels that leave out the prompt and the padding: rows of unequal length."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, shape, generator=generator)
    attention = torch.ones(shape, dtype=torch.long)
    for row in range(1, shape[0]):
        attention[row, shape[1] - row :] = 0
    batch: Batch = {"input_ids": ids, "attention_mask": attention}
    if labels:
        prompt = torch.arange(shape[1])[None, :] < torch.arange(shape[0])[:, None] + 1
        batch["labels"] = ids.masked_fill((attention == 0) | prompt, -100)
    return batch


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of the next token in the dtype of the logits."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def causal_loss(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """Loss of a transformers causal model."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return next_token_loss(logits, batch["labels"])


def plain_loss(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """Loss of a token model that returns logits."""
    return next_token_loss(model(batch["input_ids"]), batch["labels"])


def response_tokens(batch: Mapping[str, Any], layer: str) -> Tensor:
    return batch["labels"] != -100


def unpadded_tokens(batch: Mapping[str, Any], layer: str) -> Tensor:
    return batch["attention_mask"] != 0


def all_tokens(batch: Mapping[str, Any], layer: str) -> None:
    return None
