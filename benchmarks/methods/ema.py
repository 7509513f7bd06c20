"""Exponential moving average of the weights: SFT, and the average is what is used afterwards."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from methods.base import Batch, LossFunction, Method, trainable


class EMA(Method):
    """w_ema <- decay * w_ema + (1 - decay) * w after every step.

    Args:
        model: at its starting point.
        decay: of the average, in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float = 0.95) -> None:
        super().__init__(model)
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay!r}; allowed are numbers from 0 and below 1.")
        self.decay = decay
        self._average = {name: p.detach().clone() for name, p in trainable(model).items()}

    def __call__(self, model: nn.Module, batch: Batch, sft_loss_fn: LossFunction) -> Tensor:
        """The SFT loss."""
        return sft_loss_fn(model, batch)

    @torch.no_grad()
    def after_step(self) -> None:
        """Updates the average."""
        for name, p in trainable(self.model).items():
            self._average[name].lerp_(p, 1 - self.decay)

    @torch.no_grad()
    def finish(self) -> None:
        """Puts the average in the place of the weights."""
        for name, p in trainable(self.model).items():
            p.copy_(self._average[name])
