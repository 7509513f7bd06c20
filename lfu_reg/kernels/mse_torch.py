"""The pure-torch twin of the Triton kernel: the CPU path of the library, and the oracle of the kernel's tests.

On a CPU the cost is memory traffic, above all the first touch of fresh memory, and for small layers the calls
themselves. So large layers are walked in parts whose scratch stays in the cache (`mse_parts`): forward reads both
states once and keeps nothing, backward reads both once and writes the gradient; only references are saved.
Consecutive small layers of one kind are stacked and handled as one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lfu_reg.kernels.mse_parts import (
    Factor,
    Scratch,
    Selection,
    finish,
    gradient,
    select,
    squared_sum,
    wider,
)
from lfu_reg.kernels.mse_problem import Problem

# Up to this many elements a layer's calls cost more than its arithmetic, and stacking pays (measured) ...
_SMALL = 1 << 13
# ... and this many elements are stacked at most, as copies cost memory.
_STACK = 1 << 18


def run(problem: Problem) -> tuple[Tensor, Tensor]:
    """The loss and the per-layer distances of a checked problem, by torch operations."""
    entries = list(_entries(problem))
    inputs = (
        *((entry.perturbed for entry in entries) if problem.grad_perturbed else ()),
        *((entry.clean for entry in entries) if problem.grad_clean else ()),
    )
    # Saved-tensor hooks may move the tensors away between the passes; a reference here would keep them.
    problem.clean, problem.perturbed = [], []
    loss, per_layer = _MSEOverLayers.apply(problem, entries, *inputs)  # type: ignore[no-untyped-call]
    return loss, per_layer


@dataclass(slots=True)
class _Entry:
    """A layer, or several small ones stacked.

    Attributes:
        layers: their numbers in the problem.
        clean: [..., hidden], or [len(layers), ..., hidden]; dropped after forward.
        perturbed: the same shape.
        index: int64 [N], or None for all positions.
        selection: the same, cut into parts; for single layers.
        overwrite: whether h' - h may be written over `clean`.
    """

    layers: list[int]
    clean: Any
    perturbed: Any
    index: Tensor | None
    selection: Selection | None
    overwrite: bool


def _entries(problem: Problem) -> Iterator[_Entry]:
    selections: dict[int, Selection] = {}
    for group in _groups(problem):
        layer = group[0]
        h, h_prime, index = problem.clean[layer], problem.perturbed[layer], problem.index[problem.kinds.of_layer[layer]]
        if len(group) > 1:
            with torch.set_grad_enabled(problem.grad_clean and torch.is_grad_enabled()):
                h = torch.stack([problem.clean[i] for i in group])
            with torch.set_grad_enabled(problem.grad_perturbed and torch.is_grad_enabled()):
                h_prime = torch.stack([problem.perturbed[i] for i in group])
            for member in group:
                problem.overwrite[member] = False
            yield _Entry(group, h, h_prime, index, None, overwrite=False)
        else:
            kind = problem.kinds.of_layer[layer]
            if kind not in selections:
                selections[kind] = select(h, index)
            # Gathered rows would have to be scattered back, which costs more than it saves (measured).
            problem.overwrite[layer] &= selections[kind].sizes is not None
            yield _Entry(group, h, h_prime, index, selections[kind], problem.overwrite[layer])


def _groups(problem: Problem) -> Iterator[list[int]]:
    """Consecutive small layers of one kind together, every other layer by itself."""
    kinds = problem.kinds.of_layer
    limit = 1
    group: list[int] = []
    for layer, kind in enumerate(kinds):
        if not group or kind != kinds[group[0]] or len(group) == limit:
            if group:
                yield group
            group = []
            size = problem.clean[layer].numel()
            limit = _STACK // max(1, size) if size <= _SMALL and problem.device.type == "cpu" else 1
        group.append(layer)
    yield group


class _MSEOverLayers(torch.autograd.Function):
    """loss = sum_l w_l d_l of K layers; gradient 2 w_l scale_l (h' - h) to h', and the negative to h.

    Only the tensors that get a gradient are its inputs: every input costs time in autograd's bookkeeping.
    """

    @staticmethod
    def forward(ctx: Any, problem: Problem, entries: list[_Entry], *_: Tensor) -> tuple[Tensor, Tensor]:
        """Squared sums per layer; with `overwrite`, h' - h is left in the clean tensor."""
        scratch = Scratch()
        sums: list[float | Tensor] = []
        for entry in entries:
            if entry.selection is None:
                difference = _stacked_difference(entry.clean, entry.perturbed, entry.index)
                sums += torch.linalg.vector_norm(difference.flatten(1), dim=1).double().square().tolist()
            else:
                sums.append(squared_sum(entry.clean, entry.perturbed, entry.selection, entry.overwrite, scratch))
        loss, per_layer = _combine(sums, problem)
        if problem.grad_clean or problem.grad_perturbed:
            # Where the difference took the place of h, nothing of h' is needed any more.
            ctx.save_for_backward(*(t for e in entries for t in (e.clean, None if e.overwrite else e.perturbed)))
            ctx.problem, ctx.entries = problem, entries
        for entry in entries:
            entry.clean = entry.perturbed = None
        ctx.mark_non_differentiable(per_layer)
        ctx.set_materialize_grads(False)
        return loss, per_layer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        """Scaled differences, zero at positions that were not selected."""
        if upstream is None:
            return (None,) * len(ctx.needs_input_grad)
        problem: Problem = ctx.problem
        entries: list[_Entry] = ctx.entries
        problem.spend()
        factors = _factors(problem, upstream)
        saved = ctx.saved_tensors
        wanted = iter(ctx.needs_input_grad[2:])
        wants_perturbed = [problem.grad_perturbed and next(wanted) for _ in entries]
        wants_clean = [problem.grad_clean and next(wanted) for _ in entries]
        scratch = Scratch()
        to_perturbed: list[Tensor | None] = []
        to_clean: list[Tensor | None] = []
        for at, entry in enumerate(entries):
            h, h_prime = saved[2 * at], saved[2 * at + 1]
            own = [factors[layer] for layer in entry.layers]
            positive = negative = None
            if entry.overwrite and entry.selection is not None:
                positive = finish(h, entry.selection, own[0])
            elif wants_perturbed[at]:
                positive = _entry_gradient(entry, h_prime, h, own, scratch)
            if wants_clean[at]:
                negative = (
                    positive.neg()
                    if positive is not None and positive.dtype == h.dtype
                    else _entry_gradient(entry, h, h_prime, own, scratch)
                )
            to_perturbed.append(positive)
            to_clean.append(negative)
        return (
            None,
            None,
            *(to_perturbed if problem.grad_perturbed else ()),
            *(to_clean if problem.grad_clean else ()),
        )


def _entry_gradient(entry: _Entry, plus: Tensor, minus: Tensor, factors: list[Factor], scratch: Scratch) -> Tensor:
    """The gradient for `plus`: factor * (plus - minus), zero at positions that were not selected."""
    if entry.selection is not None:
        return gradient(plus, minus, entry.selection, factors[0], scratch)
    difference = _stacked_difference(minus, plus, entry.index)
    difference.mul_(torch.tensor(factors, dtype=difference.dtype)[:, None, None])
    if entry.index is not None:
        full = difference.new_zeros(len(plus), prod(plus.shape[1:-1]), plus.shape[-1])
        difference = full.index_add_(1, entry.index, difference)
    return difference.to(plus.dtype).view(plus.shape)


def _stacked_difference(h: Tensor, h_prime: Tensor, index: Tensor | None) -> Tensor:
    """The widened difference of equal layers at the selected positions, [layers, selected, hidden]."""
    wide = wider(h, h_prime)
    h, h_prime = (t.view(len(t), prod(t.shape[1:-1]), t.shape[-1]) for t in (h, h_prime))
    if index is not None:
        h, h_prime = h.index_select(1, index), h_prime.index_select(1, index)
    return h_prime - h if h_prime.dtype == wide else h_prime.to(wide).sub_(h)


def _combine(sums: Sequence[float | Tensor], problem: Problem) -> tuple[Tensor, Tensor]:
    """The loss and the per-layer distances from the squared sums."""
    per_layer = [s * scale for s, scale in zip(sums, problem.scales, strict=True)]
    weights = problem.weights
    if problem.device.type == "cpu":
        numbers = weights.tolist() if isinstance(weights, Tensor) else weights
        loss = sum(w * d for w, d in zip(numbers, per_layer, strict=True))
        return torch.tensor(loss, dtype=problem.dtype), torch.tensor(per_layer, dtype=problem.dtype)
    dtype, device = problem.dtype, problem.device
    # A layer without parts is a plain number.
    stacked = torch.stack([torch.as_tensor(d, dtype=dtype, device=device) for d in per_layer])
    return torch.dot(stacked, torch.as_tensor(weights, dtype=dtype, device=device)), stacked


def _factors(problem: Problem, upstream: Tensor) -> Sequence[float | Tensor]:
    """2 w_l scale_l * upstream per layer: numbers on the CPU, scalar tensors elsewhere (no synchronisation)."""
    weights, scales = problem.weights, problem.scales
    if problem.device.type == "cpu":
        twice = 2 * upstream.item()
        numbers = weights.tolist() if isinstance(weights, Tensor) else weights
        return [w * scale * twice for w, scale in zip(numbers, scales, strict=True)]
    dtype, device = problem.dtype, problem.device
    factors = torch.as_tensor(weights, dtype=dtype, device=device) * torch.tensor(scales, dtype=dtype, device=device)
    return (factors * (2 * upstream.to(dtype))).unbind()
