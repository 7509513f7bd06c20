"""Eq. 5: the squared distance between hidden states.

reduction="mean": per layer the mean over tokens and the hidden dimension, then over layers (the authors' code).
reduction="sum": the hidden dimension is summed, literally 1/(TK) sum_t sum_l ||h - h'||^2.
"""

from __future__ import annotations

from torch import Tensor

from lfu_reg.distances.base import PerLayerDistance, Reduction


class MSE(PerLayerDistance):
    """Mean squared error over layers."""

    def layer(self, clean: Tensor, perturbed: Tensor, reduction: Reduction) -> Tensor:
        """The squared distance per token, or per token and hidden unit."""
        difference = perturbed - clean
        total = difference.square().sum()
        return total / (clean.numel() if reduction == "mean" else len(clean))

    def __repr__(self) -> str:
        return "MSE()"
