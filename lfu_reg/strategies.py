"""How pass 1's gradients are taken, and what the caller gets.

released: one backward yields d l_SFT / d theta and g, and frees the graph before pass 2 starts; a second one yields
    d l_cons / d theta; the returned loss hands their sum to the leaves. 2 forwards, 2 backwards, one graph at a time.
retained: only g is taken at once, pass 1's graph stays, and the caller's backward runs through both passes. Needed
    where gradients of leaves cannot be taken (sharded parameters), or where l_cons flows back through the clean states.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from lfu_reg import checkpointing
from lfu_reg.auxiliaries import Auxiliary
from lfu_reg.graft import graft
from lfu_reg.graph import gradients_of, leaves_of
from lfu_reg.hooks import Pass


class Strategy(Protocol):
    """What the regularizer's step asks of a strategy."""

    def checkpoints(self) -> AbstractContextManager[None]:
        """Context of pass 1's forward, which refuses activation checkpoints if they cannot be repeated."""

    def backward_clean(self, sft_loss: Tensor, leaves: list[Tensor], clean: Pass, auxiliary: Auxiliary) -> None:
        """Take g, and d l_SFT / d theta if the graph is to be released.

        Args:
            sft_loss: scalar with the graph of pass 1.
            leaves: the leaves that it depends on.
            clean: pass 1.
            auxiliary: theta_aux, which collects g.
        """

    def total(self, consistency_term: Tensor) -> Tensor:
        """l_SFT + lam * l_cons, differentiable."""


class Released:
    """Gradients are taken at once and grafted onto the returned loss."""

    def __init__(self) -> None:
        self._value = torch.zeros(())
        self._gradients: dict[int, tuple[Tensor, Tensor | None]] = {}

    def checkpoints(self) -> AbstractContextManager[None]:
        """Welcome: they are repeated while the passes are still set up."""
        return nullcontext()

    def backward_clean(self, sft_loss: Tensor, leaves: list[Tensor], clean: Pass, auxiliary: Auxiliary) -> None:
        """One backward for everything; the taps of `clean` collect g on its way."""
        self._value = sft_loss.detach()
        gradients = gradients_of(sft_loss, leaves)
        self._add(leaves, gradients)
        self._gradients.pop(id(clean.anchor), None)
        if clean.observe:
            auxiliary.gradient_from(leaves, gradients)

    def total(self, consistency_term: Tensor) -> Tensor:
        """The graft of both terms' gradients onto the sum of their values."""
        if consistency_term.requires_grad:
            leaves = leaves_of(consistency_term)
            self._add(leaves, gradients_of(consistency_term, leaves))
        return graft(self._value + consistency_term.detach().to(self._value.device), self._gradients.values())

    def _add(self, leaves: list[Tensor], gradients: tuple[Tensor | None, ...]) -> None:
        for leaf, gradient in zip(leaves, gradients, strict=True):
            _, before = self._gradients.get(id(leaf), (leaf, None))
            together = gradient if before is None else before if gradient is None else before + gradient
            self._gradients[id(leaf)] = leaf, together


class Retained:
    """The caller's backward runs through the graphs of both passes."""

    def __init__(self) -> None:
        self._sft_loss = torch.zeros(())

    def checkpoints(self) -> AbstractContextManager[None]:
        """Refused."""
        return checkpointing.refused()

    def backward_clean(self, sft_loss: Tensor, leaves: list[Tensor], clean: Pass, auxiliary: Auxiliary) -> None:
        """A backward down to the taps, or to the weights where these are the auxiliary components."""
        self._sft_loss = sft_loss
        if clean.taps:
            torch.autograd.grad(sft_loss, clean.taps, retain_graph=True, allow_unused=True)
        elif clean.observe:
            wanted = auxiliary.leaves()
            gradients = torch.autograd.grad(sft_loss, wanted, retain_graph=True, allow_unused=True)
            auxiliary.gradient_from(wanted, gradients)

    def total(self, consistency_term: Tensor) -> Tensor:
        """The plain sum."""
        return self._sft_loss + consistency_term.to(self._sft_loss.device)


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters are sharded over processes (FSDP, ZeRO-3), so that no gradients of leaves can be taken."""
    return any(
        type(p).__name__ == "DTensor" or hasattr(p, "ds_id") or hasattr(p, "_is_flat_param") for p in model.parameters()
    )
