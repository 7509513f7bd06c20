"""Sharpness-aware minimisation (Foret et al., 2021, arXiv 2010.01412; Table 6b): the gradient at w + rho g / ||g||."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lfu_reg.model.patching import patched
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
        parameters = trainable(model)
        gradients = torch.autograd.grad(sft_loss_fn(model, batch), list(parameters.values()), allow_unused=True)
        norm = global_norm([g for g in gradients if g is not None]).clamp_min(1e-12)
        used = [(name, p, g) for (name, p), g in zip(parameters.items(), gradients, strict=True) if g is not None]
        moved = [(p.detach() + self.rho * g / norm).requires_grad_() for _, p, g in used]
        places = [
            (model.get_submodule(name.rpartition(".")[0])._parameters, name.rpartition(".")[2]) for name, _, _ in used
        ]
        with patched([(*place, tensor) for place, tensor in zip(places, moved, strict=True)]):
            loss = sft_loss_fn(model, batch)
            # Taken here: with checkpointing, a later backward would run the blocks again without the moved weights.
            gradients = torch.autograd.grad(loss, moved)
        carried = torch.stack([(p * g).sum() for (_, p, _), g in zip(used, gradients, strict=True)]).sum()
        return loss.detach() + (carried - carried.detach())
