"""EAFT (Diao et al., 2026, arXiv 2601.02151, Eq. 2 and 3): each token's loss times the entropy of what is predicted.

    L = - sum_t H_t log p(y_t),   H_t = entropy of the K most likely tokens' renormalised probabilities / ln K, K = 20

Tokens that the model contradicts with confidence count least. Mean over tokens, as in the authors' code, and no
gradient through H_t.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from methods.predictions import Predictions
from methods.token_weights import TokenWeights


class EAFT(TokenWeights):
    """Entropy-adaptive fine-tuning; it has no strength but the learning rate.

    Args:
        model: what is fine-tuned.
        top_k: K; the whole vocabulary where that is smaller.
    """

    def __init__(self, model: nn.Module, top_k: int = 20) -> None:
        super().__init__(model)
        if top_k < 2:
            raise ValueError(f"top_k={top_k!r}; allowed are whole numbers from 2: one outcome alone has no entropy.")
        self.top_k = top_k

    def weights(self, found: Predictions, losses: Tensor) -> Tensor:
        """H_t, from 0 to 1."""
        likely = found.logits.topk(min(self.top_k, found.logits.shape[-1]), dim=-1).values
        log_p = likely.log_softmax(-1)
        return -(log_p.exp() * log_p).sum(-1) / math.log(likely.shape[-1])
