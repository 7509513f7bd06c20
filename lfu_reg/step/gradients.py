"""What a step asks of a strategy, which says how gradients are taken and what the caller gets.

released: one backward yields d l_SFT / d theta and g, and frees the graph before pass 2 starts; a second one yields
    d l_cons / d theta; the returned loss hands their sum to the leaves. 2 forwards, 2 backwards, one graph at a time.
retained: only g is taken at once, pass 1's graph stays, and the caller's backward runs through both passes. Needed
    where gradients of leaves cannot be taken (sharded parameters), where l_cons flows back through the clean states,
    and where the graph goes on into one that the caller has made before.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor

from lfu_reg.auxiliaries import Auxiliary
from lfu_reg.hooks.forward_pass import ForwardPass
from lfu_reg.model.graph import grad_set_aside
from lfu_reg.step.comparison import Comparison, compare
from lfu_reg.step.float16 import LossScales, float16_in_play
from lfu_reg.step.shared_backward import SharedBackward
from lfu_reg.step.strength import StepStrength

Pair = tuple[Tensor, "Tensor | None"]
Pairs = Sequence[Pair]


class Strategy(ABC):
    """What a step asks of a strategy."""

    keeps_graph = False  # whether the graphs of both passes outlive the step
    scales_float16 = True  # whether gradients that float16 would lose are taken of a scaled loss

    def __init__(self, auxiliary: Auxiliary, scales: LossScales, trained: Sequence[Tensor]) -> None:
        self._auxiliary, self._scales, self._trained = auxiliary, scales, trained
        self._sft_loss = torch.zeros((), device="cpu")
        self._l_cons: Tensor | None = None
        self._float16 = False

    @abstractmethod
    def backward_clean(
        self, sft_loss: Tensor, leaves: list[Tensor], clean: ForwardPass, shared: SharedBackward | None
    ) -> float:
        """Take g, and d l_SFT / d theta if the graph is to be released; returns what g is multiplied by."""

    def backward_explicit(self, sft_loss: Tensor, fwd: ForwardPass) -> float:
        """Take g at the present theta_aux from a pass of its own, whose graph is freed; returns its factor."""
        auxiliary, leaves = self._auxiliary, self._auxiliary.leaves()
        float16 = self.scales_float16 and float16_in_play(fwd, [sft_loss, *leaves])
        with grad_set_aside(self._trained) as written:
            gradients, scale = self._scales.ascent.gradients(sft_loss, leaves, float16=float16)
        pairs = together(list(zip(leaves, gradients, strict=True)), written if auxiliary.moves_weights else [])
        auxiliary.gradient_from([leaf for leaf, _ in pairs], [gradient for _, gradient in pairs])
        return scale

    @abstractmethod
    def backward_perturbed(self, l_cons: Tensor, strength: StepStrength) -> None:
        """Take d l_cons / d theta if the graph is to be released."""

    @abstractmethod
    def total(self, strength: StepStrength) -> Tensor:
        """l_SFT + lam * l_cons, differentiable, with lam from `strength`. Called with pass 1 in place again."""


def together(pairs: Pairs, written: Pairs) -> Pairs:
    """Pairs of one leaf each, from gradients that were returned and those that were found in `.grad`."""
    if not written:
        return pairs
    found = {id(leaf): (leaf, gradient) for leaf, gradient in pairs}
    for leaf, gradient in written:
        before = found.get(id(leaf), (leaf, None))[1]
        found[id(leaf)] = leaf, gradient if before is None or gradient is None else before + gradient
    return list(found.values())


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
        if not self._trained:
            return None
        parts: list[tuple[Pairs, float]] = []
        for loss, scale in ((self._sft_loss, self._scales.clean), (term, self._scales.perturbed)):
            if not loss.requires_grad:  # no trained weight lies before a chosen layer
                parts.append(([], 1.0))
                continue
            with grad_set_aside(self._trained) as written:
                found, used = copy(scale).gradients(loss, self._trained, float16=self._float16, keep_graph=True)
            parts.append((together(list(zip(self._trained, found, strict=True)), written), used))
        (first, one), (second, other) = parts
        return compare(first, second, self._trained, scales=(one, other), with_product=True)
