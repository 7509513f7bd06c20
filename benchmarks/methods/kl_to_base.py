"""Staying near the base model's predictions: l_SFT + weight * KL(p_base || p) on the response tokens."""

from __future__ import annotations

from torch import Tensor, nn

from methods.base import Batch, LossFunction, Method, kl
from methods.predictions import predictions
from methods.starting_point import StartingPoint


class KLToBase(Method):
    """Distillation from the starting point.

    Args:
        model: at its starting point.
        weight: of the divergence.
    """

    def __init__(self, model: nn.Module, weight: float = 0.1) -> None:
        super().__init__(model)
        self.weight, self._start = weight, StartingPoint(model)

    def __call__(self, model: nn.Module, batch: Batch, sft_loss_fn: LossFunction) -> Tensor:
        """l_SFT plus the divergence."""
        with self._start.of(model) as base:
            anchor = predictions(base, batch, sft_loss_fn).logits.log_softmax(-1)
        found = predictions(model, batch, sft_loss_fn)
        return found.loss + self.weight * kl(anchor, found.logits.log_softmax(-1))
