"""L2-SP (Li et al., 2018, arXiv 1802.01483): weight decay towards the starting point, weight/2 ||w - w_0||^2."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from methods.base import Batch, LossFunction, Method, trainable


class L2SP(Method):
    """A spring to the starting point.

    Args:
        model: at its starting point.
        weight: of the squared distance.
    """

    def __init__(self, model: nn.Module, weight: float = 0.01) -> None:
        super().__init__(model)
        self.weight = weight
        self._start = {name: p.detach().clone() for name, p in trainable(model).items()}

    def __call__(self, model: nn.Module, batch: Batch, sft_loss_fn: LossFunction) -> Tensor:
        """l_SFT plus the spring's energy."""
        distances = [(p - self._start[name]).square().sum() for name, p in trainable(model).items()]
        return sft_loss_fn(model, batch) + self.weight / 2 * torch.stack(distances).sum()
