"""Cross-entropy with a weight for every token, through which no gradient flows: mean over tokens of w_t * CE_t."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from methods.base import Batch, LossFunction, Method
from methods.predictions import Predictions, predictions


class TokenWeights(Method):
    """Weighted cross-entropy in the place of the loss function's own."""

    @abstractmethod
    def weights(self, found: Predictions, losses: Tensor) -> Tensor:
        """One weight a token, from what is predicted and the tokens' losses; called without gradients."""

    def __call__(self, model: nn.Module, batch: Batch, sft_loss_fn: LossFunction) -> Tensor:
        """Mean over the response tokens."""
        return self.weighted(predictions(model, batch, sft_loss_fn))

    def weighted(self, found: Predictions) -> Tensor:
        """The weighted loss of what was predicted."""
        losses = token_losses(found)
        with torch.no_grad():
            weights = self.weights(found, losses)
        return weighted_mean(losses, weights)


def token_losses(found: Predictions) -> Tensor:
    """-log p(y_t), [tokens]."""
    return cross_entropy(found.logits, found.targets, reduction="none")


def weighted_mean(losses: Tensor, weights: Tensor) -> Tensor:
    """Sum of weight times loss over the number of tokens; zero where there are none."""
    return (weights * losses).sum() / max(len(losses), 1)


def mean_by_sample(losses: Tensor, samples: Tensor) -> Tensor:
    """Mean loss of each sample that has any tokens."""
    counts = samples.bincount()
    return losses.new_zeros(len(counts)).index_add(0, samples, losses)[counts > 0] / counts[counts > 0]
