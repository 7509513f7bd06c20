"""The graphs of both passes stay, and the caller's backward runs through them."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor

from lfu_reg.auxiliaries import Auxiliary
from lfu_reg.hooks.forward_pass import ForwardPass
from lfu_reg.model.graph import grad_set_aside
from lfu_reg.step.comparison import Comparison, compare
from lfu_reg.step.float16 import LossScales, float16_in_play
from lfu_reg.step.gradients import down_to_components, together
from lfu_reg.step.shared_backward import SharedBackward
from lfu_reg.step.strength import StepStrength


class Retained:
    """The caller's backward runs through the graphs of both passes. Ranks in lockstep may not repeat a backward."""

    keeps_graph = True

    def __init__(
        self, auxiliary: Auxiliary, scales: LossScales, trained: Sequence[Tensor], *, may_scale: bool = True
    ) -> None:
        self.scales_float16 = may_scale
        self._auxiliary, self._scales, self._trained = auxiliary, scales, trained
        self._sft_loss = torch.zeros((), device="cpu")
        self._l_cons: Tensor | None = None
        self._float16 = False

    def backward_clean(
        self, sft_loss: Tensor, leaves: list[Tensor], clean: ForwardPass, shared: SharedBackward | None
    ) -> float:
        """A backward down to the taps, or to the weights where these are the auxiliary components."""
        self._sft_loss = sft_loss
        self._float16 = self.scales_float16 and float16_in_play(clean, [sft_loss, *leaves])
        if not clean.observe:
            return 1.0
        auxiliary = self._auxiliary
        own = auxiliary.leaves() if auxiliary.moves_weights else []
        with clean.gate.opened(), grad_set_aside(self._trained) as written:
            # Every tap depends on the anchor, so the way to it goes through all of them.
            gradients, scale = self._scales.clean.gradients(
                sft_loss,
                [clean.anchor, *own],
                float16=self._float16,
                keep_graph=True,
                gate=clean.gate,
                forget=auxiliary.forget_gradient,
            )
        pairs = together(list(zip(own, gradients[1:], strict=True)), written)
        auxiliary.gradient_from([leaf for leaf, _ in pairs], [gradient for _, gradient in pairs])
        return scale

    def backward_explicit(self, sft_loss: Tensor, fwd: ForwardPass) -> float:
        """A backward down to the components."""
        scale, float16 = self._scales.ascent, self.scales_float16
        return down_to_components(sft_loss, fwd, self._auxiliary, scale, self._trained, float16=float16)

    def backward_perturbed(self, l_cons: Tensor, strength: StepStrength) -> None:
        """Nothing but a note of the term."""
        self._l_cons = l_cons

    def total(self, strength: StepStrength) -> Tensor:
        """The weighted sum; where that is due, both gradients are taken, to be compared."""
        if self._l_cons is None:
            return self._sft_loss
        whole = self._compare(self._l_cons) if strength.compares and strength.pays else None
        lam = strength.weigh(whole, None, self._sft_loss.device)
        return self._sft_loss + (lam * self._l_cons).to(self._sft_loss.device, self._l_cons.dtype)

    def _compare(self, l_cons: Tensor) -> Comparison | None:
        if not self._trained or not l_cons.requires_grad:
            return None
        parts = []
        for loss, scale in ((self._sft_loss, self._scales.clean), (l_cons, self._scales.perturbed)):
            with grad_set_aside(self._trained) as written:
                found, used = copy(scale).gradients(loss, self._trained, float16=self._float16, keep_graph=True)
            parts.append((together(list(zip(self._trained, found, strict=True)), written), used))
        (first, one), (second, other) = parts
        return compare(first, second, self._trained, scales=(one, other), with_product=True)
