"""How pass 1's gradients are taken, and what the caller gets.

released: one backward yields d l_SFT / d theta and g, and frees the graph before pass 2 starts; a second one yields
    d l_cons / d theta; the returned loss hands their sum to the leaves. 2 forwards, 2 backwards, one graph at a time.
retained: only g is taken at once, pass 1's graph stays, and the caller's backward runs through both passes. Needed
    where gradients of leaves cannot be taken (sharded parameters), or where l_cons flows back through the clean states.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from lfu_reg.auxiliaries import Auxiliary
from lfu_reg.graft import graft
from lfu_reg.graph import leaves_of
from lfu_reg.hooks import Pass
from lfu_reg.loss_scale import LossScales, float16_in_play


class Strategy(Protocol):
    """What the regularizer's step asks of a strategy.

    Attributes:
        keeps_graph: whether the graphs of both passes outlive the step, with what checkpointed blocks need to repeat.
    """

    keeps_graph: bool

    def backward_clean(self, sft_loss: Tensor, leaves: list[Tensor], clean: Pass, auxiliary: Auxiliary) -> None:
        """Take g, and d l_SFT / d theta if the graph is to be released.

        Args:
            sft_loss: scalar with the graph of pass 1.
            leaves: the leaves that it depends on.
            clean: pass 1, which is told the scale that g is multiplied by.
            auxiliary: theta_aux, which collects g.
        """

    def total(self, consistency_term: Tensor) -> Tensor:
        """l_SFT + lam * l_cons, differentiable."""


class Released:
    """Gradients are taken at once and grafted onto the returned loss.

    Args:
        scales: for float16, remembered from step to step.
    """

    keeps_graph = False

    def __init__(self, scales: LossScales | None = None) -> None:
        self._scales = LossScales() if scales is None else scales
        self._value = torch.zeros(())
        self._float16, self._scale = False, 1.0
        self._gradients: dict[int, tuple[Tensor, Tensor | None]] = {}

    def backward_clean(self, sft_loss: Tensor, leaves: list[Tensor], clean: Pass, auxiliary: Auxiliary) -> None:
        """One backward for everything; the taps of `clean` collect g on its way."""
        self._value = sft_loss.detach()
        self._float16 = float16_in_play(clean, [sft_loss, *leaves])
        gradients, self._scale = self._scales.clean.gradients(
            sft_loss, leaves, float16=self._float16, gate=clean.gate, forget=auxiliary.forget_gradient
        )
        clean.scale = self._scale
        self._add(leaves, gradients, self._scale)
        self._gradients.pop(id(clean.anchor), None)
        if clean.observe:
            auxiliary.gradient_from(leaves, gradients)

    def total(self, consistency_term: Tensor) -> Tensor:
        """The graft of both terms' gradients onto the sum of their values."""
        if consistency_term.requires_grad:
            leaves = leaves_of(consistency_term)
            gradients, scale = self._scales.perturbed.gradients(consistency_term, leaves, float16=self._float16)
            self._add(leaves, gradients, scale)
        value = self._value + consistency_term.detach().to(self._value.device)
        return graft(value, self._gradients.values(), self._scale)

    def _add(self, leaves: list[Tensor], gradients: tuple[Tensor | None, ...], scale: float) -> None:
        for leaf, gradient in zip(leaves, gradients, strict=True):
            if gradient is None:
                continue
            if scale != self._scale:
                gradient = _exact(gradient) * (self._scale / scale)
            _, before = self._gradients.get(id(leaf), (leaf, None))
            together = gradient if before is None else _exact(before) + _exact(gradient)
            self._gradients[id(leaf)] = leaf, together


def _exact(gradient: Tensor) -> Tensor:
    # Scaled gradients fill the range of float16, and their sum would leave it.
    return gradient.float() if gradient.dtype is torch.float16 else gradient


class Retained:
    """The caller's backward runs through the graphs of both passes.

    Args:
        scales: for g in float16, remembered from step to step.
    """

    keeps_graph = True

    def __init__(self, scales: LossScales | None = None) -> None:
        self._scales = LossScales() if scales is None else scales
        self._sft_loss = torch.zeros(())

    def backward_clean(self, sft_loss: Tensor, leaves: list[Tensor], clean: Pass, auxiliary: Auxiliary) -> None:
        """A backward down to the taps, or to the weights where these are the auxiliary components."""
        self._sft_loss = sft_loss
        wanted: list[Tensor | GradientEdge] = [*clean.taps] or [*auxiliary.leaves()]
        if not clean.observe or not wanted:
            return
        gradients, clean.scale = self._scales.clean.gradients(
            sft_loss,
            wanted,
            float16=float16_in_play(clean, [sft_loss, *leaves]),
            keep_graph=True,
            gate=clean.gate,
            forget=auxiliary.forget_gradient,
        )
        if not clean.taps:
            auxiliary.gradient_from(auxiliary.leaves(), gradients)

    def total(self, consistency_term: Tensor) -> Tensor:
        """The plain sum."""
        return self._sft_loss + consistency_term.to(self._sft_loss.device)


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters are sharded over processes (FSDP, ZeRO-3), so that no gradients of leaves can be taken."""
    return any(
        type(p).__name__ == "DTensor" or hasattr(p, "ds_id") or hasattr(p, "_is_flat_param") for p in model.parameters()
    )
