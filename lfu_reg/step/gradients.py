"""How pass 1's gradients are taken, and what the caller gets.

released: one backward yields d l_SFT / d theta and g, and frees the graph before pass 2 starts; a second one yields
    d l_cons / d theta; the returned loss hands their sum to the leaves. 2 forwards, 2 backwards, one graph at a time.
retained: only g is taken at once, pass 1's graph stays, and the caller's backward runs through both passes. Needed
    where gradients of leaves cannot be taken (sharded parameters), or where l_cons flows back through the clean states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lfu_reg.auxiliaries import Auxiliary
from lfu_reg.distributed.fsdp2 import Shards
from lfu_reg.hooks.forward_pass import Gate, Pass
from lfu_reg.model.graph import leaves_of
from lfu_reg.step.float16 import LossScale, LossScales, float16_in_play
from lfu_reg.step.returned_loss import graft
from lfu_reg.step.shared_backward import SharedPrefix


class Strategy(Protocol):
    """What the regularizer's step asks of a strategy.

    Attributes:
        keeps_graph: whether the graphs of both passes outlive the step, with what checkpointed blocks need to repeat.
        scales_float16: whether gradients that float16 would lose are taken of a scaled loss.
        shares_prefix: whether `clean.prefix` may be set, whose backward then waits for both passes.
    """

    keeps_graph: bool
    scales_float16: bool
    shares_prefix: bool

    def backward_clean(self, sft_loss: Tensor, leaves: list[Tensor], clean: Pass, auxiliary: Auxiliary) -> None:
        """Take g, and d l_SFT / d theta if the graph is to be released.

        Args:
            sft_loss: scalar with the graph of pass 1.
            leaves: the leaves that it depends on.
            clean: pass 1, which is told the scale that g is multiplied by.
            auxiliary: theta_aux, which collects g.
        """

    def backward_explicit(self, sft_loss: Tensor, this: Pass, auxiliary: Auxiliary) -> None:
        """Take g at the present theta_aux from a pass of its own, whose graph is freed.

        Args:
            sft_loss: scalar with the graph of that pass.
            this: the pass, which is told the scale that g is multiplied by.
            auxiliary: theta_aux, which collects g.
        """

    def backward_perturbed(self, consistency_term: Tensor) -> None:
        """Take d (lam * l_cons) / d theta if the graph is to be released."""

    def total(self) -> Tensor:
        """l_SFT + lam * l_cons, differentiable. Called with the hooks of pass 1 in place."""


class Released:
    """Gradients are taken at once and grafted onto the returned loss.

    Args:
        scales: for float16, remembered from step to step.
    """

    keeps_graph = False
    scales_float16 = True
    shares_prefix = True

    def __init__(self, scales: LossScales | None = None) -> None:
        self._scales = LossScales() if scales is None else scales
        self._value = torch.zeros(())
        self._prefix: SharedPrefix | None = None
        self._float16, self._scale = False, 1.0
        self._gradients: dict[int, tuple[Tensor, Tensor | None]] = {}

    def backward_clean(self, sft_loss: Tensor, leaves: list[Tensor], clean: Pass, auxiliary: Auxiliary) -> None:
        """One backward for everything; the taps of `clean` collect g on its way."""
        self._value, self._prefix = sft_loss.detach(), clean.prefix
        self._float16 = float16_in_play(clean, [sft_loss, *leaves])
        if clean.prefix is not None:
            leaves = clean.prefix.above
        pairs, self._scale = self._differentiate(
            sft_loss, leaves, self._scales.clean, clean.gate, auxiliary.forget_gradient
        )
        clean.scale = self._scale
        self._add(pairs, self._scale)
        for own in (clean.anchor, *auxiliary.temporary_leaves()):
            self._gradients.pop(id(own), None)
        if clean.observe:
            auxiliary.gradient_from([leaf for leaf, _ in pairs], [gradient for _, gradient in pairs])

    def backward_explicit(self, sft_loss: Tensor, this: Pass, auxiliary: Auxiliary) -> None:
        """A backward down to the components."""
        _down_to_components(sft_loss, this, auxiliary, self._scales.ascent, float16=True)

    def backward_perturbed(self, consistency_term: Tensor) -> None:
        """A second backward, added to the first."""
        if consistency_term.requires_grad:
            self._add(*self._differentiate(consistency_term, leaves_of(consistency_term), self._scales.perturbed))
        if self._prefix is not None:
            self._prefix.collect(self._gradients.pop(id(self._prefix.start), (None, None))[1])
        self._value = self._value + consistency_term.detach().to(self._value.device)

    def total(self) -> Tensor:
        """The graft of both terms' gradients onto the sum of their values."""
        if self._prefix is not None:
            self._add(self._prefix.backward(), 1.0)
        return graft(self._value, self._gradients.values(), self._scale)

    def _differentiate(
        self,
        loss: Tensor,
        leaves: list[Tensor],
        scale: LossScale,
        gate: Gate | None = None,
        forget: Callable[[], None] = lambda: None,
    ) -> tuple[Sequence[tuple[Tensor, Tensor | None]], float]:
        edge = [] if gate is None or self._prefix is None or self._prefix.edge is None else [self._prefix.edge]
        gradients, used = scale.gradients(loss, [*leaves, *edge], float16=self._float16, gate=gate, forget=forget)
        if edge and self._prefix is not None:
            self._prefix.collect(gradients[-1])
        return list(zip(leaves, gradients, strict=False)), used

    def _add(self, pairs: Sequence[tuple[Tensor, Tensor | None]], scale: float) -> None:
        for leaf, gradient in pairs:
            if gradient is None:
                self._gradients.setdefault(id(leaf), (leaf, None))
                continue
            if scale != self._scale:
                gradient = _exact(gradient) * (self._scale / scale)
            _, before = self._gradients.get(id(leaf), (leaf, None))
            together = gradient if before is None else _exact(before) + _exact(gradient)
            self._gradients[id(leaf)] = leaf, together


def _exact(gradient: Tensor) -> Tensor:
    # Scaled gradients fill the range of float16, and their sum would leave it.
    return gradient.float() if gradient.dtype is torch.float16 else gradient


class ReleasedShards(Released):
    """The same under FSDP2. Nothing is scaled for float16: a repeated backward would have to be repeated on all ranks.

    Args:
        shards: the sharded parameters.
    """

    scales_float16 = False
    shares_prefix = False

    def __init__(self, shards: Shards) -> None:
        super().__init__()
        self._shards = shards

    def backward_explicit(self, sft_loss: Tensor, this: Pass, auxiliary: Auxiliary) -> None:
        """A backward down to the components; a whole one where these are the shards."""
        if not auxiliary.moves_weights:
            _down_to_components(sft_loss, this, auxiliary, self._scales.ascent, float16=False)
            return
        pairs = self._shards.gradients_of(sft_loss, leaves_of(sft_loss))
        auxiliary.gradient_from([leaf for leaf, _ in pairs], [gradient for _, gradient in pairs])

    def _differentiate(
        self,
        loss: Tensor,
        leaves: list[Tensor],
        scale: LossScale,
        gate: Gate | None = None,
        forget: Callable[[], None] = lambda: None,
    ) -> tuple[Sequence[tuple[Tensor, Tensor | None]], float]:
        return self._shards.gradients_of(loss, leaves), 1.0


class Retained:
    """The caller's backward runs through the graphs of both passes.

    Args:
        scales: for g in float16, remembered from step to step.
        may_scale: False where ranks run in lockstep, and none may repeat a backward on its own.
    """

    keeps_graph = True
    shares_prefix = False

    def __init__(self, scales: LossScales | None = None, *, may_scale: bool = True) -> None:
        self.scales_float16 = may_scale
        self._scales = LossScales() if scales is None else scales
        self._sft_loss = self._consistency_term = torch.zeros(())

    def backward_clean(self, sft_loss: Tensor, leaves: list[Tensor], clean: Pass, auxiliary: Auxiliary) -> None:
        """A backward down to the taps, or to the weights where these are the auxiliary components."""
        self._sft_loss = sft_loss
        own = auxiliary.temporary_leaves() or ([] if clean.taps else auxiliary.leaves())
        wanted: list[Tensor | GradientEdge] = [*clean.taps, *own]
        if not clean.observe or not wanted:
            return
        gradients, clean.scale = self._scales.clean.gradients(
            sft_loss,
            wanted,
            float16=self.scales_float16 and float16_in_play(clean, [sft_loss, *leaves]),
            keep_graph=True,
            gate=clean.gate,
            forget=auxiliary.forget_gradient,
        )
        auxiliary.gradient_from(own, gradients[len(clean.taps) :])

    def backward_explicit(self, sft_loss: Tensor, this: Pass, auxiliary: Auxiliary) -> None:
        """A backward down to the components."""
        _down_to_components(sft_loss, this, auxiliary, self._scales.ascent, float16=self.scales_float16)

    def backward_perturbed(self, consistency_term: Tensor) -> None:
        """Nothing but a note of the term."""
        self._consistency_term = consistency_term

    def total(self) -> Tensor:
        """The plain sum."""
        return self._sft_loss + self._consistency_term.to(self._sft_loss.device)


def _down_to_components(sft_loss: Tensor, this: Pass, auxiliary: Auxiliary, scale: LossScale, *, float16: bool) -> None:
    leaves = auxiliary.leaves()
    in_play = float16 and float16_in_play(this, [sft_loss, *leaves])
    gradients, this.scale = scale.gradients(sft_loss, leaves, float16=in_play)
    auxiliary.gradient_from(leaves, gradients)
