"""What a model predicts in the very forward that a loss function runs, so that nothing has to run twice.

A loss function may call the model, or the trunk and the head itself, the head perhaps on response tokens alone or in
chunks: the model's logits are taken where it returned some, else those of its head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from methods.base import IGNORED, Batch, LossFunction


@dataclass(frozen=True)
class Predictions:
    """Of one call of a loss function.

    Attributes:
        loss: what it returned.
        logits: those that predict a response token, [tokens, vocabulary], in at least float32.
        targets: these tokens, [tokens].
        samples: the row of the batch that each belongs to, [tokens].
    """

    loss: Tensor
    logits: Tensor
    targets: Tensor
    samples: Tensor


def predictions(model: nn.Module, batch: Batch, sft_loss_fn: LossFunction) -> Predictions:
    """Calls the loss function and takes note of the logits.

    Raises:
        ValueError: where no logits were to be seen, their shape fits no reading, or no gradient reaches them.
    """
    whole: list[Any] = []
    parts: list[Tensor] = []
    handles = [model.register_forward_hook(lambda module, args, output: whole.append(output))]
    if (head := _head(model)) is not None:
        handles.append(head.register_forward_hook(lambda module, args, output: parts.append(output)))
    try:
        loss = sft_loss_fn(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    logits = getattr(whole[-1], "logits", None) if whole else None
    if logits is None and parts:
        logits = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)
    if logits is None:
        raise ValueError(
            "This method needs logits, and the loss function neither called the model for them nor its head "
            f"({'none is known' if head is None else type(head).__name__}). Let it call model(**batch) or the head as "
            "a module: a fused loss that multiplies by the head's weight itself shows none."
        )
    if loss.requires_grad and not logits.requires_grad:
        raise ValueError(
            "The loss function's logits have no gradient though its loss has one: they come from a reentrant "
            "checkpoint, or are detached. Use a checkpoint with use_reentrant=False, or none around the head."
        )
    labels = batch["labels"][:, 1:]
    counted = labels != IGNORED
    logits = _at(counted, logits)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return Predictions(loss, logits, labels[counted], counted.nonzero()[:, 0])


def _head(model: nn.Module) -> nn.Module | None:
    """The module that makes logits of hidden states, as transformers names it."""
    get = getattr(model, "get_output_embeddings", None)
    return None if get is None else get()


def _at(counted: Tensor, logits: Tensor) -> Tensor:
    """Rows of the logits at counted positions, [samples, length - 1], whatever the head was called on."""
    samples, length = counted.shape
    vocabulary = logits.shape[-1]
    if logits.shape[:-1].numel() == samples * (length + 1):
        return logits.reshape(samples, length + 1, vocabulary)[:, :-1][counted]
    if logits.shape[:-1].numel() == samples * length:
        return logits.reshape(samples, length, vocabulary)[counted]
    if logits.shape[:-1].numel() == int(counted.sum()):
        return logits.reshape(-1, vocabulary)
    raise ValueError(
        f"Logits of shape {tuple(logits.shape)} fit neither the {samples} x {length + 1} tokens of the batch, nor all "
        f"but the last of each, nor the {int(counted.sum())} that predict a response token. Let the loss function call "
        "the model or its head on one of these."
    )
