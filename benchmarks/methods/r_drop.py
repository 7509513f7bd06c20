"""R-Drop (Wu et al., 2021, arXiv 2106.14448): two forwards with different dropout, their predictions pulled together.

l = (CE_1 + CE_2) / 2 + weight * (KL(p_1 || p_2) + KL(p_2 || p_1)) / 2
"""

from __future__ import annotations

from torch import Tensor, nn

from methods.base import Batch, LossFunction, Method, kl
from methods.predictions import predictions


class RDrop(Method):
    """Consistency under dropout.

    Args:
        model: with dropout, otherwise both forwards are the same.
        weight: of the divergence.
        needs_dropout: whether a model without dropout is refused; for its cost alone it need not be.

    Raises:
        ValueError: if the model has no dropout and needs it.
    """

    def __init__(self, model: nn.Module, weight: float = 1.0, *, needs_dropout: bool = True) -> None:
        super().__init__(model)
        if needs_dropout and not any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules()):
            raise ValueError("R-Drop compares two dropout masks, and this model has no dropout. Use lora_dropout=0.1.")
        self.weight = weight

    def __call__(self, model: nn.Module, batch: Batch, sft_loss_fn: LossFunction) -> Tensor:
        """Both losses and the divergence."""
        found = [predictions(model, batch, sft_loss_fn) for _ in range(2)]
        one, two = (each.logits.log_softmax(-1) for each in found)
        return (found[0].loss + found[1].loss) / 2 + self.weight * (kl(one, two) + kl(two, one)) / 2
