"""A control: SFT with the gradient of l_cons added at a set length, g_SFT + rho * ||g_SFT|| * g_cons / ||g_cons||."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lfu_reg import LfURegularizer
from lfu_reg.step.returned_loss import returned_loss
from methods.base import Batch, LossFunction, Method, global_norm, trainable
from methods.lfu import FLAVOURS


class ExtraGradient(Method):
    """SFT plus an extra gradient.

    With an ascent's flavour ("steering", "lora", "weights") this is LfU without any say of lambda or of the size of
    l_cons, so it isolates the direction of g_cons. With a random one ("random-steering", "random") it has the same
    length and comes by the same way, but from a perturbation that knows nothing of the loss: what is left then is the
    effect of some extra gradient of hidden states. The two side by side say what the ascent is good for.

    Two gradients are subtracted, so a step costs about as much as SFT's and LfU's together.

    Args:
        model: what is fine-tuned.
        rho: length of the extra gradient relative to that of l_SFT.
        flavour: one of `FLAVOURS`.
        options: of `LfURegularizer`, but for lam.
    """

    def __init__(self, model: nn.Module, rho: float = 1.0, flavour: str = "steering", **options: Any) -> None:
        super().__init__(model)
        if rho < 0:
            raise ValueError(f"rho={rho!r}; allowed are numbers from 0.")
        self.rho, self._lam = rho, 1.0
        self.reg = LfURegularizer(model, FLAVOURS[flavour](), lam=lambda step: self._lam, **options)

    def __call__(self, model: nn.Module, batch: Batch, sft_loss_fn: LossFunction) -> Tensor:
        """l_SFT, with that gradient."""
        leaves = list(trainable(model).values())
        with torch.random.fork_rng():  # the regularizer's dropout is to be the same
            sft_loss = sft_loss_fn(model, batch)
            g_sft = _gradients(sft_loss, leaves)
        both = _gradients(self.reg(model, batch, sft_loss_fn), leaves)
        g_cons = [together - alone for together, alone in zip(both, g_sft, strict=True)]
        length, found = global_norm(g_sft), global_norm(g_cons)
        factor = self.rho * length / found if float(found) > 0 else torch.zeros_like(found)
        if float(found) > 0 and float(length) > 0:
            # At the next step both have about the same length, and their difference the most digits.
            self._lam *= float(length / found)
        extra = [one + factor * other for one, other in zip(g_sft, g_cons, strict=True)]
        return returned_loss(sft_loss, zip(leaves, extra, strict=True))

    def finish(self) -> None:
        """Hooks off."""
        self.reg.remove()


def _gradients(loss: Tensor, leaves: list[nn.Parameter]) -> list[Tensor]:
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, gradients, strict=True)]
