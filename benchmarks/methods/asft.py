"""ASFT (Zhu et al., 2025, arXiv 2509.23753): DFT, anchored to the base model by a divergence.

    L = L_DFT + weight * KL(p_base || p),   mean over response tokens

Source: the authors' published code (`train.py`, mode "asft"), which has the divergence in this direction; the number of
the equation in the text was not looked up.
"""

from __future__ import annotations

from torch import Tensor, nn

from methods.base import Batch, LossFunction, kl
from methods.dft import DFT
from methods.predictions import predictions
from methods.starting_point import StartingPoint


class ASFT(DFT):
    """Anchored supervised fine-tuning.

    Args:
        model: at its starting point.
        weight: of the divergence; the authors' example has 0.05.
    """

    def __init__(self, model: nn.Module, weight: float = 0.05) -> None:
        super().__init__(model)
        self.weight, self._start = weight, StartingPoint(model)

    def __call__(self, model: nn.Module, batch: Batch, sft_loss_fn: LossFunction) -> Tensor:
        """DFT's loss plus the divergence."""
        with self._start.of(model) as base:
            anchor = predictions(base, batch, sft_loss_fn).logits.log_softmax(-1)
        found = predictions(model, batch, sft_loss_fn)
        return self.weighted(found) + self.weight * kl(anchor, found.logits.log_softmax(-1))
