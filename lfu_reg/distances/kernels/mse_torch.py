"""The pure-torch twin of the Triton kernel: the CPU path of the library, and the oracle of the kernel's tests.

On a CPU the cost is memory traffic, above all the first touch of fresh memory, and for small layers the calls
themselves. So large layers are walked in parts whose scratch stays in the cache (`mse_parts`): forward reads both
states once and keeps nothing, backward reads both once and writes the gradient; only references are saved.
Consecutive small layers of one kind are stacked and handled as one (`mse_stack`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor

from lfu_reg.distances.kernels.mse_parts import Factor, Layer, Scratch, Selection, select
from lfu_reg.distances.kernels.mse_problem import Problem
from lfu_reg.distances.kernels.mse_stack import Stack
from lfu_reg.distances.kernels.once import once

# Up to this many elements a layer's calls cost more than its arithmetic, and stacking pays (measured) ...
_SMALL = 1 << 13
# ... and this many elements are stacked at most, as copies cost memory.
_STACK = 1 << 18


class Entry(Protocol):
    """A layer, or several small ones stacked.

    Attributes:
        layers: their numbers in the problem.
        clean: what stands for h among the inputs of the autograd function.
        perturbed: the same for h'.
    """

    layers: range
    clean: Any
    perturbed: Any

    def forward(self, scratch: Scratch) -> tuple[Sequence[float | Tensor], tuple[Tensor, Tensor | None]]:
        """The squared sum of each of its layers, and what backward needs; lets go of `clean` and `perturbed`."""

    def backward(
        self, saved: Sequence[Tensor], factors: Sequence[Factor], wanted: tuple[bool, bool], scratch: Scratch
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients for `perturbed` and `clean`, where wanted; the factors are one per layer."""


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


def _entries(problem: Problem) -> Iterator[Entry]:
    """Consecutive small layers of one kind together, every other layer by itself."""
    kinds = problem.kinds
    start = 0
    selections: dict[int, Selection] = {}
    for kind, run in groupby(kinds.of_layer):
        stop = start + len(list(run))
        size = kinds.positions[kind] * kinds.hidden[kind]
        step = _STACK // max(1, size) if size <= _SMALL and problem.device.type == "cpu" else 1
        for layer in range(start, stop, step):
            layers = range(layer, min(stop, layer + step))
            if len(layers) > 1:
                yield Stack(problem, layers, kind)
                continue
            h, index = problem.clean[layer], problem.index[kind]
            if kind not in selections:
                selections[kind] = select(h, index)
            # Gathered rows would have to be scattered back, which costs more than it saves (measured).
            problem.overwrite[layer] &= selections[kind].sizes is not None
            yield Layer(layers, h, problem.perturbed[layer], selections[kind], problem.overwrite[layer])
        start = stop


class _MSEOverLayers(torch.autograd.Function):
    """loss = sum_l w_l d_l of K layers; gradient 2 w_l scale_l (h' - h) to h', and the negative to h.

    Only the tensors that get a gradient are its inputs: every input costs time in autograd's bookkeeping.
    """

    @staticmethod
    def forward(ctx: Any, problem: Problem, entries: list[Entry], *_: Tensor) -> tuple[Tensor, Tensor]:
        """Squared sums per layer; with `overwrite`, h' - h is left in the clean tensor."""
        scratch = Scratch()
        sums: list[float | Tensor] = []
        needed: list[Tensor | None] = []
        for entry in entries:
            own, saved = entry.forward(scratch)
            sums += own
            needed += saved
        loss, per_layer = combine(sums, problem)
        if problem.grad_clean or problem.grad_perturbed:
            ctx.save_for_backward(*needed)
            ctx.problem, ctx.entries = problem, entries
        ctx.mark_non_differentiable(per_layer)
        ctx.set_materialize_grads(False)
        return loss, per_layer

    @staticmethod
    @once
    def backward(ctx: Any, upstream: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        """Scaled differences, zero at positions that were not selected."""
        if upstream is None:
            return (None,) * len(ctx.needs_input_grad)
        problem: Problem = ctx.problem
        entries: list[Entry] = ctx.entries
        problem.spend()
        factors = factors_of(problem, upstream)
        saved = ctx.saved_tensors
        asked = iter(ctx.needs_input_grad[2:])
        wants_perturbed = [problem.grad_perturbed and next(asked) for _ in entries]
        wants_clean = [problem.grad_clean and next(asked) for _ in entries]
        scratch = Scratch()
        found = [
            entry.backward(
                saved[2 * at : 2 * at + 2],
                factors[entry.layers.start : entry.layers.stop],
                (wants_perturbed[at], wants_clean[at]),
                scratch,
            )
            for at, entry in enumerate(entries)
        ]
        return (
            None,
            None,
            *((to_perturbed for to_perturbed, _ in found) if problem.grad_perturbed else ()),
            *((to_clean for _, to_clean in found) if problem.grad_clean else ()),
        )


def combine(sums: Sequence[float | Tensor], problem: Problem) -> tuple[Tensor, Tensor]:
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


def factors_of(problem: Problem, upstream: Tensor) -> Sequence[float | Tensor]:
    """2 w_l scale_l * upstream per layer: numbers on the CPU, scalar tensors elsewhere (no synchronisation)."""
    weights, scales = problem.weights, problem.scales
    if problem.device.type == "cpu":
        twice = 2 * upstream.item()
        numbers = weights.tolist() if isinstance(weights, Tensor) else weights
        return [w * scale * twice for w, scale in zip(numbers, scales, strict=True)]
    dtype, device = problem.dtype, problem.device
    factors = torch.as_tensor(weights, dtype=dtype, device=device) * torch.tensor(scales, dtype=dtype, device=device)
    return (factors * (2 * upstream.to(dtype))).unbind()
