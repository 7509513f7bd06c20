"""The graphs of both passes stay, and the caller's backward runs through them."""

from __future__ import annotations

from copy import copy

from torch import Tensor

from lfu_reg.hooks.forward_pass import ForwardPass
from lfu_reg.model.graph import grad_set_aside
from lfu_reg.step.comparison import Comparison, compare
from lfu_reg.step.float16 import float16_in_play
from lfu_reg.step.gradients import Strategy, together
from lfu_reg.step.shared_backward import SharedBackward
from lfu_reg.step.strength import StepStrength


class Retained(Strategy):
    """The caller's backward runs through the graphs of both passes."""

    keeps_graph = True

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

    def backward_perturbed(self, l_cons: Tensor, strength: StepStrength) -> None:
        """Nothing but a note of the term."""
        self._l_cons = l_cons

    def total(self, strength: StepStrength) -> Tensor:
        """The weighted sum; where that is due, both gradients are taken, to be compared."""
        if self._l_cons is None:
            return self._sft_loss
        whole = self._compare(self._term(1.0)) if strength.compares and strength.pays else None
        lam = strength.weigh(whole, None, self._sft_loss.device)
        return self._sft_loss + self._term(lam).to(self._sft_loss.device, self._l_cons.dtype)

    def _term(self, lam: float | Tensor) -> Tensor:
        """Lam * l_cons, with its graph."""
        assert self._l_cons is not None
        return lam * self._l_cons

    def _compare(self, term: Tensor) -> Comparison | None:
        """Both terms' gradients, each by a backward of its own."""
        if not self._trained or not term.requires_grad:
            return None
        parts = []
        for loss, scale in ((self._sft_loss, self._scales.clean), (term, self._scales.perturbed)):
            with grad_set_aside(self._trained) as written:
                found, used = copy(scale).gradients(loss, self._trained, float16=self._float16, keep_graph=True)
            parts.append((together(list(zip(self._trained, found, strict=True)), written), used))
        (first, one), (second, other) = parts
        return compare(first, second, self._trained, scales=(one, other), with_product=True)
