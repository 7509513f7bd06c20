"""The pure-torch twin of the Triton kernel: the CPU path of the library, and the oracle of the kernel's tests.

On a CPU the cost is memory traffic, and above all the first touch of fresh memory. So layers are walked in pieces
whose scratch stays in the cache: forward reads both states once and writes nothing, backward reads both once and
writes the gradient once. The function saves references to its inputs and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lfu_reg.kernels.mse_problem import Problem

# Elements per piece: two float32 scratch buffers of this size are 4 MiB.
_PIECE_CPU = 1 << 19
# Elsewhere there is no cache to stay in; the pieces only bound the temporaries.
_PIECE_OTHER = 1 << 24


def run(problem: Problem) -> tuple[Tensor, Tensor]:
    """The loss and the per-layer distances of a checked problem, by torch operations."""
    loss, per_layer = _MSEOverLayers.apply(problem, *problem.clean, *problem.perturbed)  # type: ignore[no-untyped-call]
    return loss, per_layer


class _MSEOverLayers(torch.autograd.Function):
    """loss = sum_l w_l d_l of K layers; gradients 2 w_l scale_l (h' - h) to h', and the negative to h."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, *states: Tensor) -> tuple[Tensor, Tensor]:
        """Squared sums per layer; with `overwrite`, h' - h is left in the clean tensor."""
        count = len(problem.scales)
        clean, perturbed = states[:count], states[count:]
        scratch = _Scratch()
        values = []
        for h, h_prime, index, scale, overwrite in zip(
            clean, perturbed, problem.index, problem.scales, problem.overwrite, strict=True
        ):
            pieces = _squared_sums(_rows(h), _rows(h_prime), index, overwrite, scratch)
            # On the CPU reading a number costs nothing, and Python adds pieces in double precision.
            total = sum(s.item() for s in pieces) if h.device.type == "cpu" else sum(pieces)
            values.append(total * scale)
        per_layer = _vector(values, problem)
        loss = torch.dot(per_layer, _vector(problem.weights, problem))
        if problem.grad_clean or problem.grad_perturbed:
            ctx.problem = problem
            ctx.save_for_backward(
                *clean, *(None if o else t for o, t in zip(problem.overwrite, perturbed, strict=True))
            )
        ctx.mark_non_differentiable(per_layer)
        ctx.set_materialize_grads(False)
        return loss, per_layer

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, upstream: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        """Scaled differences, zero at positions that were not selected."""
        problem: Problem = ctx.problem
        count = len(problem.scales)
        if upstream is None:
            return (None,) * (1 + 2 * count)
        spend(problem)
        saved = ctx.saved_tensors
        scales = torch.tensor(problem.scales, dtype=problem.dtype, device=problem.device)
        factors = _vector(problem.weights, problem) * scales * (2 * upstream.to(problem.dtype))
        on_cpu = problem.device.type == "cpu"
        numbers = factors.tolist() if on_cpu else factors.unbind()
        scratch = _Scratch()
        to_clean: list[Tensor | None] = [None] * count
        to_perturbed: list[Tensor | None] = [None] * count
        for layer, (h, h_prime, index, factor, overwrite) in enumerate(
            zip(saved[:count], saved[count:], problem.index, numbers, problem.overwrite, strict=True)
        ):
            wants_clean = problem.grad_clean and ctx.needs_input_grad[1 + layer]
            if overwrite:
                to_perturbed[layer] = _finish(h, index, factor)
                continue
            wants_perturbed = problem.grad_perturbed and ctx.needs_input_grad[1 + count + layer]
            if wants_perturbed:
                to_perturbed[layer] = _gradient(h_prime, h, index, factor, scratch)
            if wants_clean:
                mirror = to_perturbed[layer]
                to_clean[layer] = (
                    _gradient(h, h_prime, index, factor, scratch)
                    if mirror is None or mirror.dtype != h.dtype
                    else -mirror
                )
        return (None, *to_clean, *to_perturbed)


def spend(problem: Problem) -> None:
    """Refuse a second backward where the first one consumed the differences.

    Raises:
        RuntimeError: if it was spent before.
    """
    if any(problem.overwrite):
        if not problem.layers:
            raise RuntimeError(
                "This loss was backpropagated before, and with overwrite_clean=True its first backward used up "
                "the differences. Call backward once, or pass overwrite_clean=False."
            )
        problem.layers = []


class _Scratch:
    """Buffers that are allocated at most once per call and then stay in the cache."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def get(self, slot: str, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Uninitialised memory of the shape of `like`; a slot's contents are lost at its next use."""
        buffer = self._buffers.get((slot, dtype))
        if buffer is None or buffer.numel() < like.numel():
            buffer = self._buffers[slot, dtype] = like.new_empty(like.numel(), dtype=dtype)
        if buffer.numel() != like.numel():
            buffer = buffer[: like.numel()]
        return buffer.view(like.shape)


def _rows(states: Tensor) -> Tensor:
    """[..., hidden] as [positions, hidden]; a copy only where the strides of the leading dimensions demand one."""
    return states.reshape(states[..., 0].numel(), states.shape[-1])


def _pieces(rows: Tensor, index: Tensor | None) -> Iterator[tuple[slice, Tensor | None]]:
    """Ranges of rows, or of entries of `index`, that hold about one piece of elements."""
    piece = _PIECE_CPU if rows.device.type == "cpu" else _PIECE_OTHER
    step = max(1, piece // max(1, rows.shape[1]))
    count = len(rows) if index is None else len(index)
    for start in range(0, count, step):
        part = slice(start, min(count, start + step))
        yield part, None if index is None else index[part]


def _squared_sums(
    h: Tensor, h_prime: Tensor, index: Tensor | None, overwrite: bool, scratch: _Scratch
) -> Iterator[Tensor]:
    """One scalar per piece: the sum over it of (h' - h)^2, accumulated in float32 or wider."""
    wide = torch.promote_types(torch.promote_types(h.dtype, h_prime.dtype), torch.float32)
    for part, positions in _pieces(h, index):
        a, b = _take(h_prime, part, positions, "a", scratch), _take(h, part, positions, "b", scratch)
        if overwrite:
            # In place when all positions count; gathered rows go back to where they came from.
            difference = torch.sub(a, b, out=b)
            if positions is not None:
                h.index_copy_(0, positions, difference)
            if difference.dtype != wide:
                difference = scratch.get("wide", difference, wide).copy_(difference)
        elif a.dtype == b.dtype == wide:
            difference = torch.sub(a, b, out=scratch.get("a", a, wide))
        else:
            # Widened before the subtraction, as the kernel does it: half precision may not hold the difference.
            difference = scratch.get("wide", a, wide).copy_(a).sub_(scratch.get("wide b", b, wide).copy_(b))
        flat = difference.reshape(-1)
        yield torch.dot(flat, flat)


def _take(
    rows: Tensor, part: slice, positions: Tensor | None, slot: str, scratch: _Scratch
) -> Tensor:
    if positions is None:
        return rows[part]
    shape = rows[:1].expand(len(positions), -1)
    return torch.index_select(rows, 0, positions, out=scratch.get(slot, shape, rows.dtype))


def _gradient(
    plus: Tensor, minus: Tensor, index: Tensor | None, factor: float | Tensor, scratch: _Scratch
) -> Tensor:
    """factor * (plus - minus) at the selected positions and zero elsewhere, in the shape and dtype of `plus`."""
    gradient = plus.new_empty(plus.shape) if index is None else plus.new_zeros(plus.shape)
    a_rows, b_rows, out_rows = _rows(plus), _rows(minus), _rows(gradient)
    for part, positions in _pieces(a_rows, index):
        a, b = _take(a_rows, part, positions, "a", scratch), _take(b_rows, part, positions, "b", scratch)
        out = out_rows[part] if positions is None else a
        if isinstance(factor, float):
            torch.sub(a, b, out=out).mul_(factor)
        else:
            # A number on the device would be rounded to the dtype of `out` first, and may vanish in it.
            wide = factor.dtype
            out.copy_(a.to(wide).sub_(b).mul_(factor))
        if positions is not None:
            out_rows.index_copy_(0, positions, out)
    return gradient


def _finish(difference: Tensor, index: Tensor | None, factor: float | Tensor) -> Tensor:
    """Turn the difference that forward left in the clean tensor into the gradient, in place."""
    rows = _rows(difference.detach())
    if isinstance(factor, float):
        rows.mul_(factor)
    else:
        for part, _ in _pieces(rows, None):
            rows[part].copy_(rows[part].to(factor.dtype).mul_(factor))
    if index is not None:
        skipped = torch.ones(len(rows), dtype=torch.bool, device=rows.device).index_fill_(0, index, False)
        rows.masked_fill_(skipped[:, None], 0)
    return rows.view(difference.shape)


def _vector(values: Any, problem: Problem) -> Tensor:
    """K numbers, K scalar tensors, or a tensor [K], as a tensor [K] of the result's dtype."""
    if isinstance(values, Tensor):
        return values
    if any(isinstance(value, Tensor) for value in values):
        zero = torch.zeros((), dtype=problem.dtype, device=problem.device)
        return torch.stack([zero + value for value in values])
    return torch.tensor(values, dtype=problem.dtype, device=problem.device)
