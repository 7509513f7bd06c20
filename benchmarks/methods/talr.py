"""TALR (Lin et al., 2025, arXiv 2509.20758): tokens that are hard for the model at present count less.

    L = mean_t w_t CE_t,   w_t = max(p(y_t)^(1 / tau), floor),   tau = median over the batch of the samples' mean loss

w is the minimiser of sum_t w_t CE_t + tau sum_t w_t log w_t on the simplex, up to its normalisation. Source: the
formula was not found in the paper's own words. Closed form, floor and stopped gradient are as accounts of the paper
describe them; tau, the floor's value and that nothing is normalised are as a published reimplementation has them.
"""

from __future__ import annotations

from torch import Tensor, nn

from methods.predictions import Predictions
from methods.token_weights import TokenWeights, mean_by_sample


class TALR(TokenWeights):
    """Token-adaptive loss reweighting; tau follows the batch, so there is no strength but the learning rate.

    Args:
        model: what is fine-tuned.
        floor: smallest weight.
    """

    def __init__(self, model: nn.Module, floor: float = 0.01) -> None:
        super().__init__(model)
        if not 0 <= floor <= 1:
            raise ValueError(f"floor={floor!r}; allowed are numbers from 0 to 1.")
        self.floor = floor

    def weights(self, found: Predictions, losses: Tensor) -> Tensor:
        """p(y_t)^(1 / tau), not below the floor."""
        if not len(losses):
            return losses
        tau = mean_by_sample(losses, found.samples).quantile(0.5).clamp_min(1e-6)
        return (-losses / tau).exp().clamp_min(self.floor)
