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
        norm = global_norm([g for g in gradients if g is not None])
        moved = []
        for (name, p), gradient in zip(parameters.items(), gradients, strict=True):
            if gradient is not None:
                owner, _, leaf = name.rpartition(".")
                moved.append((model.get_submodule(owner), leaf, p + self.rho * gradient / norm.clamp_min(1e-12)))
        with patched(moved):
            return sft_loss_fn(model, batch)
