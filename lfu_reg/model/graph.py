"""Walks over the autograd graph, and gradients of its leaves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge

from lfu_reg.model.autocast import no_autocast

REENTRANT = (
    "Reentrant activation checkpointing (use_reentrant=True) hides its inside from autograd.grad, so neither the "
    "ascent direction nor the gradients can be taken through it. Use use_reentrant=False: "
    'model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}) in transformers, '
    "torch.utils.checkpoint.checkpoint(..., use_reentrant=False) by hand."
)


# Functions in Python whose backward hands the gradient on as it is.
_LINEAR = ("_TapBackward",)


@dataclass(frozen=True)
class Graph:
    """What a walk down from a loss has found."""

    leaves: list[Tensor]  # each once, in order of discovery
    nodes: set[Any]
    reaches_outside: bool = False  # to nodes older than the forward: a batch that comes out of another network, say

    @property
    def own(self) -> list[Any]:
        """Functions in Python, with a backward of their own."""
        return [node for node in self.nodes if isinstance(node, BackwardCFunction)]


def now() -> int:
    """The number of the next node of this thread's graphs: every node that is made later has at least this one."""
    node: Any = torch.zeros((), dtype=torch.float32, device="cpu", requires_grad=True).clone().grad_fn
    return int(node._sequence_nr())


def graph_of(loss: Tensor, since: int = 0, stop: tuple[Any, int] | None = None) -> Graph:
    """The graph that `loss` depends on, but for the edge `stop`; nodes from before `since`, a `now()`, are outside."""
    # Leaves are found by walking down, not from `model.parameters()`: a soft prompt, a separate head or a trained loss
    # scale outside of the model must get its gradient too.
    if loss.grad_fn is None:
        return Graph([loss] if loss.requires_grad else [], set())
    # Every step looks at thousands of nodes, so this is written for speed: a kind's name is looked up once.
    stop_node = None if stop is None else stop[0]
    found: list[Tensor] = []
    seen: set[Any] = {loss.grad_fn}
    waiting: list[Any] = [loss.grad_fn]
    names: dict[type, str] = {}
    outside = False
    while waiting:
        node = waiting.pop()
        kind = type(node)
        name = names.get(kind) or names.setdefault(kind, kind.__name__)
        if name == "AccumulateGrad":
            # As in a backward: it may have been frozen since, by another adapter's turn.
            if node.variable.requires_grad:
                found.append(node.variable)
            continue
        if name == "CheckpointFunctionBackward":
            raise RuntimeError(REENTRANT)
        # Autocast keeps the casts of weights until its context ends; they hold nothing that a backward would free.
        outside = outside or (node._sequence_nr() < since and name != "ToCopyBackward0")
        for edge in node.next_functions:
            below = edge[0]
            if below is None or below in seen or (below is stop_node and edge == stop):
                continue
            seen.add(below)
            waiting.append(below)
    return Graph(found, seen, outside)


def reenters(loss: Tensor) -> bool:
    """Whether reentrant checkpointing hides a part of the graph from `autograd.grad`."""
    try:
        graph_of(loss)
    except RuntimeError:
        return True
    return False


def leaves_above_and_below(loss: Tensor, cut: Tensor) -> tuple[list[Tensor], list[Tensor]] | None:
    """The leaves of `loss` other than through `cut`, and those of `cut`; None where something flows around the cut."""
    if not cut.requires_grad:
        return graph_of(loss).leaves, []
    if cut.grad_fn is None or loss.grad_fn is None:
        return None
    below = graph_of(cut)
    above = graph_of(loss, stop=(cut.grad_fn, cut.output_nr))
    # A function with a backward of its own need not be linear in what comes from above: it may clip, or normalise.
    if below.nodes & above.nodes or any(type(node).__name__ not in _LINEAR for node in below.own):
        return None
    return above.leaves, below.leaves


def gradients_of(
    loss: Tensor, wanted: Sequence[Tensor | GradientEdge], upstream: Tensor | None = None, *, keep_graph: bool = False
) -> tuple[Tensor | None, ...]:
    """Gradients of `loss`, times the scalar `upstream`, for leaves or edges of its graph; None where there is none."""
    with hooks_quiet([leaf for leaf in wanted if isinstance(leaf, Tensor)]), no_autocast():
        # It takes a mixture as well, whatever its annotation says.
        return torch.autograd.grad(loss, wanted, upstream, retain_graph=keep_graph, allow_unused=True)  # type: ignore[arg-type]


@contextmanager
def hooks_quiet(leaves: Sequence[Tensor]) -> Iterator[None]:
    """Keep the hooks of leaves quiet for the block."""
    # Users clip or mask gradients with them, or step an optimizer: they are to act once, on what the caller's backward
    # accumulates.
    names = ("_backward_hooks", "_post_accumulate_grad_hooks")
    tables = (getattr(leaf, name, None) for leaf in leaves for name in names)
    hooked = [(hooks, dict(hooks)) for hooks in tables if hooks]
    try:
        for hooks, _ in hooked:
            hooks.clear()  # the engine holds this very dictionary
        yield
    finally:
        for hooks, kept in hooked:
            hooks.update(kept)


@contextmanager
def grad_set_aside(tensors: Iterable[Tensor]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """No `.grad` on these tensors in the block, and then the old ones; yields a list that gets the block's own."""
    kept = list({id(tensor): (tensor, tensor.grad) for tensor in tensors}.values())  # each once
    # An autograd.Function that calls `backward()` in its backward writes to `.grad`.
    written: list[tuple[Tensor, Tensor]] = []
    for tensor, gradient in kept:
        if gradient is not None:
            tensor.grad = None
    try:
        yield written
        written += [(tensor, tensor.grad) for tensor, _ in kept if tensor.grad is not None]
    finally:
        for tensor, gradient in kept:
            if tensor.grad is not gradient:
                tensor.grad = gradient
