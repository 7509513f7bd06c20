"""Taps: nodes of the autograd graph that hand the gradient on and collect the ascent direction from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lfu_reg.model.graph import graph_of


class Gate:
    """What a tap knows of its pass: a reference to the pass and its states would be a cycle through the graph."""

    def __init__(self) -> None:
        self.is_open = False  # while the library's own backward of the pass runs, so that taps collect
        self.is_crossed = False  # whether somebody took a gradient of a gradient through a tap
        self.finite: list[Tensor] | None = None  # where asked for: whether each gradient is, as unread scalars

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Let taps collect in the block."""
        self.is_open = True
        try:
            yield
        finally:
            self.is_open = False


class LateRule:
    """The rule of a tap that is known only when there is a result to keep."""

    rule: Callable[[Tensor], Sequence[Tensor | None]]

    def __call__(self, gradient: Tensor) -> Sequence[Tensor | None]:
        """The rule's."""
        return self.rule(gradient)


class LastGradient:
    """Hands on the gradient that arrives first in a backward, which is the last layer's, with what belongs to it."""

    def __init__(self, receive: Callable[[Any, Tensor], None]) -> None:
        self._receive: Callable[[Any, Tensor], None] | None = receive

    def rule_for(self, state: Any) -> Callable[[Tensor], Sequence[Tensor | None]]:
        """The rule of a tap on one layer's output."""

        def rule(gradient: Tensor) -> Sequence[Tensor | None]:
            nonlocal state
            receive, self._receive = self._receive, None
            arrived, state = state, None  # the graph may live on
            if receive is not None:
                receive(arrived, gradient)
            return ()

        return rule


def tap(tensor: Tensor, anchor: Tensor, gate: Gate, rule: Callable[[Tensor], Sequence[Tensor | None]]) -> Tensor:
    """The same values in the same memory, as a node of the graph of its own that `rule` is called from.

    A node, and not a hook on `tensor`: hooks that the model has put on the tensor come after it, and those that are put
    on the result come before, as they do for a component that is added here. The result is neither a leaf nor a view,
    so the model may change it in place. The anchor always receives zero: the result is part of a graph also below the
    first trained weight, and a backward that asks for the anchor's gradient passes here.
    """
    result: Tensor = _Tap.apply(tensor, anchor, gate, rule)  # type: ignore[no-untyped-call]
    return result


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, anchor: Tensor, gate: Gate, rule: Any) -> Tensor:
        ctx.gate, ctx.rule, ctx.anchor_like = gate, rule, anchor.detach()
        return tensor.data

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None, None]:
        gate: Gate = ctx.gate
        if gate.is_open:
            collected = ctx.rule(grad_output)
            if gate.finite is not None:
                gate.finite += [torch.isfinite(c).all() for c in collected if c is not None]
        elif torch.is_grad_enabled():
            gate.is_crossed = True
        return grad_output, torch.zeros_like(ctx.anchor_like), None, None


def depends_on_a_tap(tensor: Tensor) -> bool:
    """Whether a tap of any pass lies in the graph of `tensor`."""
    return any(type(node).__name__ == "_TapBackward" for node in graph_of(tensor).nodes)
