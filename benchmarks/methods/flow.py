"""FLOW (Sanyal et al., 2025, arXiv 2502.02797, Algorithm 1): samples that the base model knows already count more.

    L = sum_i w_i f_i(theta),   w_i = exp(-f_i(theta_base) / tau),   tau = median_i f_i(theta_base) (Remark 4.2)

f_i(theta_base) is the mean loss of a sample's response tokens. As in the authors' code for language models, L is the
sum of all token losses, each times its sample's weight, over the number of tokens: with weights of one it is SFT.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from methods.base import Batch, LossFunction, Method
from methods.base_losses import BaseLosses
from methods.predictions import predictions
from methods.token_weights import token_losses, weighted_mean


class FLOW(Method):
    """Weighted samples. Wants `prepare`.

    Args:
        model: at its starting point.
        temperature: tau as a multiple of the median; the paper's is 1, and smaller is stronger.
    """

    def __init__(self, model: nn.Module, temperature: float = 1.0) -> None:
        super().__init__(model)
        if temperature <= 0:
            raise ValueError(f"temperature={temperature!r}; allowed are numbers above 0.")
        self.temperature, self._base, self._tau = temperature, BaseLosses(model), 1.0

    def prepare(self, batches: Iterable[Batch], sft_loss_fn: LossFunction) -> None:
        """The base model's losses, and tau."""
        self._base.measure(self.model, batches, sft_loss_fn)
        means = torch.stack([losses.mean() for losses in self._base.all() if len(losses)])
        self._tau = self.temperature * float(means.quantile(0.5))

    def __call__(self, model: nn.Module, batch: Batch, sft_loss_fn: LossFunction) -> Tensor:
        """Mean over the response tokens."""
        weights = torch.stack([(-losses.mean() / self._tau).exp() for losses in self._base.of(batch)])
        found = predictions(model, batch, sft_loss_fn)
        return weighted_mean(token_losses(found), weights[found.samples])
