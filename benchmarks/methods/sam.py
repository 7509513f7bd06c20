"""Sharpness-aware minimisation (Foret et al., 2021, arXiv 2010.01412; Table 6b): the gradient at w + rho g / ||g||."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lfu_reg.model.moving import moved_in_place
from methods.base import Batch, LossFunction, Method, global_norm, trainable


class SAM(Method):
    """The SFT loss at the worst point nearby.

    Args:
        model: what is fine-tuned.
        rho: how far to go.
    """

    def __init__(self, model: nn.Module, rho: float = 0.05) -> None:
        super().__init__(model)
        self.rho = rho

    def __call__(self, model: nn.Module, batch: Batch, sft_loss_fn: LossFunction) -> Tensor:
        """l_SFT(w + epsilon), whose gradient is taken with respect to w as if epsilon were constant."""
        parameters = list(trainable(model).values())
        gradients = torch.autograd.grad(sft_loss_fn(model, batch), parameters, allow_unused=True)
        norm = global_norm([g for g in gradients if g is not None]).clamp_min(1e-12)
        used = [(p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None]
        with moved_in_place([(p.data, self.rho * g / norm) for p, g in used]):
            loss = sft_loss_fn(model, batch)
            # Taken here: with checkpointing, a later backward would run the blocks again without the moved weights.
            gradients = torch.autograd.grad(loss, [p for p, _ in used])
        carried = torch.stack([(p * g).sum() for (p, _), g in zip(used, gradients, strict=True)]).sum()
        return loss.detach() + (carried - carried.detach())
