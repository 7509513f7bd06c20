"""Taps: nodes of the autograd graph that hand the gradient on and collect the ascent direction from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lfu_reg.auxiliaries.base import GradientRule
from lfu_reg.model.graph import graph_of


class Gate:
    """What a tap knows of its pass: a reference to the pass and its states would be a cycle through the graph."""

    def __init__(self) -> None:
        self.is_open = False  # while the library's own backward of the pass runs, so that taps collect
        self.is_crossed = False  # whether somebody took a gradient of a gradient, or a tangent, through a tap
        self.finite: list[Tensor] | None = None  # where asked for: whether each gradient is, as unread scalars

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Let taps collect in the block."""
        self.is_open = True
        try:
            yield
        finally:
            self.is_open = False


def tap(
    tensor: Tensor, anchor: Tensor, gate: Gate, observe: Callable[[Tensor], GradientRule | None] | None = None
) -> Tensor:
    """The same values in the same memory, as a node of its own; calls the rule that `observe` makes of the result.

    A node, and not a hook on `tensor`: hooks that the model has put on the tensor come after it, and those that are put
    on the result come before, as they do for a component that is added here. The result is neither a leaf nor a view,
    so the model may change it in place. The anchor always receives zero: the result is part of a graph also below the
    first trained weight, and a backward that asks for the anchor's gradient passes here.
    """
    rules: list[GradientRule] = []
    result: Tensor = _Tap.apply(tensor, anchor, gate, rules)  # type: ignore[no-untyped-call]
    # Of the result, whose version tells what keeps it for the backward whether the model writes to it.
    if observe is not None and (rule := observe(result.detach())) is not None:
        rules.append(rule)
    return result


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, anchor: Tensor, gate: Gate, rules: list[GradientRule]) -> Tensor:
        ctx.gate, ctx.rules, ctx.anchor_like = gate, rules, anchor.detach()
        return tensor.data

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None, None]:
        gate: Gate = ctx.gate
        if gate.is_open:
            collected = [gradient for rule in ctx.rules for gradient in rule(grad_output)]
            if gate.finite is not None:
                gate.finite += [torch.isfinite(c).all() for c in collected if c is not None]
        elif torch.is_grad_enabled():
            gate.is_crossed = True
        return grad_output, torch.zeros_like(ctx.anchor_like), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor | None, *others: Any) -> Tensor | None:
        ctx.gate.is_crossed = True  # components take part in the tangents as well
        return None if tangent is None else tangent.clone()


def depends_on_a_tap(tensor: Tensor) -> bool:
    """Whether a tap of any pass lies in the graph of `tensor`."""
    return any(type(node).__name__ == "_TapBackward" for node in graph_of(tensor).nodes)
