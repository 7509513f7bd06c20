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
    """What a walk down from a loss has found.

    Attributes:
        leaves: leaf tensors, each once, in order of discovery.
        nodes: every node of the graph.
        reaches_outside: whether a node is older than the forward (a batch that comes out of another network, say).
    """

    leaves: list[Tensor]
    nodes: set[Any]
    reaches_outside: bool = False


def now() -> int:
    """The number of the next node of this thread's graphs: every node that is made later has at least this one."""
    node: Any = torch.zeros((), dtype=torch.float32, device="cpu", requires_grad=True).clone().grad_fn
    return int(node._sequence_nr())


def graph_of(loss: Tensor, since: int = 0, stop: tuple[Any, int] | None = None) -> Graph:
    """The graph that `loss` depends on.

    Leaves are found by walking down to the AccumulateGrad nodes, not from `model.parameters()`: a soft prompt, a
    separate head or a trained loss scale outside of the model must get its gradient too.

    Args:
        loss: tensor with a graph.
        since: `now()` before the forward; nodes with a smaller number are older.
        stop: edge (node, output number) that is not followed.

    Raises:
        RuntimeError: if the graph holds a reentrant checkpoint, whose inner leaves cannot be seen.
    """
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
            if (
                node.variable.requires_grad
            ):  # as in a backward: it may have been frozen since, by another adapter's turn
                found.append(node.variable)
            continue
        if name == "CheckpointFunctionBackward":
            raise RuntimeError(REENTRANT)
        outside = outside or node._sequence_nr() < since
        for edge in node.next_functions:
            below = edge[0]
            if below is None or below in seen or (below is stop_node and edge == stop):
                continue
            seen.add(below)
            waiting.append(below)
    return Graph(found, seen, outside)


def leaves_of(loss: Tensor) -> list[Tensor]:
    """Leaf tensors that `loss` depends on, each once."""
    return graph_of(loss).leaves


def leaves_above_and_below(loss: Tensor, cut: Tensor) -> tuple[list[Tensor], list[Tensor]] | None:
    """The leaves that `loss` depends on other than through `cut`, and those that `cut` depends on.

    Returns:
        The leaves; None where a part of the graph belongs to both, so that something flows around the cut, or where the
        gradients below need not be linear in those at the cut.
    """
    if not cut.requires_grad:
        return leaves_of(loss), []
    if cut.grad_fn is None or loss.grad_fn is None:
        return None
    below = graph_of(cut)
    above = graph_of(loss, stop=(cut.grad_fn, cut.output_nr))
    # A function with a backward of its own need not be linear in what comes from above: it may clip, or normalise.
    own = (node for node in below.nodes if isinstance(node, BackwardCFunction))
    if below.nodes & above.nodes or any(type(node).__name__ not in _LINEAR for node in own):
        return None
    return above.leaves, below.leaves


def gradients_of(
    loss: Tensor,
    wanted: Sequence[Tensor | GradientEdge],
    upstream: Tensor | None = None,
    *,
    keep_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """Gradients of `loss` with respect to leaves or edges of its graph, None where there is none; frees the graph.

    Args:
        loss: scalar with a graph.
        wanted: leaves or edges.
        upstream: scalar by which every gradient is multiplied, None for 1.
        keep_graph: leave the graph for another backward.
    """
    with hooks_quiet([leaf for leaf in wanted if isinstance(leaf, Tensor)]), no_autocast():
        # It takes a mixture as well, whatever its annotation says.
        return torch.autograd.grad(loss, wanted, upstream, retain_graph=keep_graph, allow_unused=True)  # type: ignore[arg-type]


@contextmanager
def hooks_quiet(leaves: Sequence[Tensor]) -> Iterator[None]:
    """Keep the hooks of leaves quiet for the block.

    Users clip or mask gradients with them, or step an optimizer: they are to act once, on what the caller's backward
    accumulates.
    """
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
    """No `.grad` on these tensors in the block; afterwards they have what they had before.

    What the block's own backward has left in `.grad` is added to the list that is yielded, as it ends. An
    autograd.Function that calls `backward()` in its backward writes there.
    """
    kept = list({id(tensor): (tensor, tensor.grad) for tensor in tensors}.values())  # each once
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
