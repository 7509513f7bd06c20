"""Walks over the autograd graph: the leaves a loss depends on, and a way to make a tensor take part in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.autograd.graph import GradientEdge

from lfu_reg.model.autocast import no_autocast

REENTRANT = (
    "Reentrant activation checkpointing (use_reentrant=True) hides its inside from autograd.grad, so neither the "
    "ascent direction nor the gradients can be taken through it. Use use_reentrant=False: "
    'model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}) in transformers, '
    "torch.utils.checkpoint.checkpoint(..., use_reentrant=False) by hand."
)


def leaves_of(loss: Tensor) -> list[Tensor]:
    """Leaf tensors that `loss` depends on, each once.

    They are found by walking down to the AccumulateGrad nodes, not from `model.parameters()`: a soft prompt, a separate
    head or a trained loss scale outside of the model must get its gradient too.

    Args:
        loss: tensor with a graph.

    Returns:
        The leaves in order of discovery.

    Raises:
        RuntimeError: if the graph holds a reentrant checkpoint, whose inner leaves cannot be seen.
    """
    if loss.grad_fn is None:
        return [loss] if loss.requires_grad else []
    return _walk(loss.grad_fn)[0]


def leaves_above_and_below(loss: Tensor, cut: Tensor) -> tuple[list[Tensor], list[Tensor]] | None:
    """The leaves that `loss` depends on other than through `cut`, and those that `cut` depends on.

    Args:
        loss: tensor with a graph.
        cut: tensor in that graph.

    Returns:
        The leaves; None where a part of the graph belongs to both, so that something flows around the cut.

    Raises:
        RuntimeError: if the graph holds a reentrant checkpoint.
    """
    if not cut.requires_grad:
        return leaves_of(loss), []
    if cut.grad_fn is None or loss.grad_fn is None:
        return None
    below, nodes_below = _walk(cut.grad_fn)
    above, nodes_above = _walk(loss.grad_fn, (cut.grad_fn, cut.output_nr))
    return None if nodes_below & nodes_above else (above, below)


def _walk(start: Any, stop: tuple[Any, int] | None = None) -> tuple[list[Tensor], set[Any]]:
    """Leaves and nodes that a node depends on, itself included; edges that are equal to `stop` are not followed."""
    # Every step looks at thousands of nodes, so this is written for speed: a kind's name is looked up once.
    stop_node = None if stop is None else stop[0]
    found: list[Tensor] = []
    seen, waiting = {start}, [start]
    names: dict[type, str] = {}
    while waiting:
        node = waiting.pop()
        kind = type(node)
        name = names.get(kind) or names.setdefault(kind, kind.__name__)
        if name == "AccumulateGrad":
            found.append(node.variable)
            continue
        if name == "CheckpointFunctionBackward":
            raise RuntimeError(REENTRANT)
        for edge in node.next_functions:
            below = edge[0]
            if below is None or below in seen or (below is stop_node and edge == stop):
                continue
            seen.add(below)
            waiting.append(below)
    return found, seen


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


def nothing_saved() -> AbstractContextManager[None]:
    """Context in which graphs are built that keep no tensors, for a forward that is never backpropagated.

    Hooks are to run as with gradients, which `no_grad` would not have.
    """
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing)


def take_part(tensor: Tensor, anchor: Tensor) -> Tensor:
    """The same values as part of a graph, for an activation below the first trainable weight.

    The result shares memory with `tensor`. It is not a leaf, so the model may still change it in place, and it
    depends on `anchor`, so that a backward that asks for the anchor's gradient passes through here.

    Args:
        tensor: activation that requires no gradient.
        anchor: scalar leaf that requires a gradient; it always receives zero.

    Returns:
        Tensor shaped like `tensor` that requires a gradient.
    """
    # `.data` and not `.detach()`: marking it dirty must not bump the version that other users of `tensor` rely on.
    result: Tensor = _TakePart.apply(tensor.data, anchor)  # type: ignore[no-untyped-call]
    return result


class _TakePart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, tensor: Tensor, anchor: Tensor) -> Tensor:
        ctx.mark_dirty(tensor)
        ctx.anchor_device = anchor.device  # type: ignore[attr-defined]
        return tensor

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, Tensor]:
        return None, torch.zeros((), device=ctx.anchor_device)


def no_view(tensor: Tensor) -> Tensor:
    """The same values, memory and gradients, but no view of another tensor.

    Hooks of a view are lost when the model writes into it, as an in-place activation after a linear map does: its
    history is then written anew from its base on.

    Args:
        tensor: any tensor that requires a gradient.

    Returns:
        `tensor` itself where it is no view.
    """
    if torch.compiler.is_compiling() or not tensor._is_view():
        return tensor
    result: Tensor = _NoView.apply(tensor)  # type: ignore[no-untyped-call]
    return result


class _NoView(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, tensor: Tensor) -> Tensor:
        return tensor.data

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        return grad_output
