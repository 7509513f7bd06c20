"""STM (Wu et al., 2025, arXiv 2501.14315, Section 3): tokens that surprise the base model are no labels.

A response token counts if its perplexity under the base model, 1 / p_base(y_t), is at most the threshold; the loss
function is the same, on fewer labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from methods.base import IGNORED, Batch, LossFunction, Method
from methods.base_losses import BaseLosses


class STM(Method):
    """Selective token masking. Wants `prepare`.

    Args:
        model: at its starting point.
        threshold: largest perplexity of a token that counts; the paper's is 2.5, and smaller is stronger.
    """

    def __init__(self, model: nn.Module, threshold: float = 2.5) -> None:
        super().__init__(model)
        if threshold < 1:
            raise ValueError(f"threshold={threshold!r}; allowed are numbers from 1, the least perplexity there is.")
        self.threshold, self._base = threshold, BaseLosses(model)

    def prepare(self, batches: Iterable[Batch], sft_loss_fn: LossFunction) -> None:
        """The base model's losses."""
        self._base.measure(self.model, batches, sft_loss_fn)

    def __call__(self, model: nn.Module, batch: Batch, sft_loss_fn: LossFunction) -> Tensor:
        """The loss function of the labels that are left; zero where none is."""
        surprising = torch.cat(self._base.of(batch)) > math.log(self.threshold)
        labels = batch["labels"].clone()
        predicted = labels[:, 1:]
        counted = predicted != IGNORED
        predicted[counted] = predicted[counted].masked_fill(surprising, IGNORED)
        if bool(surprising.all()):
            return sft_loss_fn(model, batch) * 0.0  # a mean over no labels is NaN
        return sft_loss_fn(model, {**batch, "labels": labels})
