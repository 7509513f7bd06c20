"""DFT (Wu et al., 2025, arXiv 2508.05629, Eq. 9): each token's loss times its own probability.

L = - sum_t sg(p(y_t)) log p(y_t),   here as a mean over tokens, as common implementations have it
"""

from __future__ import annotations

from torch import Tensor

from methods.predictions import Predictions
from methods.token_weights import TokenWeights


class DFT(TokenWeights):
    """Dynamic fine-tuning; it has no strength but the learning rate."""

    def weights(self, found: Predictions, losses: Tensor) -> Tensor:
        """p(y_t)."""
        return (-losses).exp()
