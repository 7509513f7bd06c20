"""The squared difference over layers by Triton kernels: one launch forward, one backward, and two tiny ones.

Imports triton, so `mse_over_layers` imports this module only when it is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lfu_reg.kernels import mse_layout as settings
from lfu_reg.kernels.mse_layout import collapse, share_of
from lfu_reg.kernels.mse_problem import Problem
from lfu_reg.kernels.mse_table import Group, Table, build_table
from lfu_reg.kernels.mse_triton import backward_kernel, forward_kernel, mask_kernel, reduce_kernel

_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
_REDUCE_LAYERS, _REDUCE_PROGRAMS = 16, 256  # tile of the second reduction
_MASK_BLOCK = 1024


def run(problem: Problem) -> tuple[Tensor, Tensor]:
    """The loss and the per-layer distances of a checked problem, by Triton kernels."""
    for dtype in {tensor.dtype for tensor in (*problem.clean, *problem.perturbed)}:
        if dtype not in _DTYPES:
            raise ValueError(f"The Triton kernel reads float16, bfloat16 and float32, not {dtype}; use impl='torch'.")
    clean, perturbed = _describable(problem.clean), _describable(problem.perturbed)
    wants = [
        (problem.grad_perturbed and h_prime.requires_grad) or (problem.grad_clean and h.requires_grad)
        for h, h_prime in zip(clean, perturbed, strict=True)
    ]
    # Saved-tensor hooks may move the tensors away between the passes; a reference here would keep them.
    problem.clean, problem.perturbed = [], []
    inputs = (*(perturbed if problem.grad_perturbed else ()), *(clean if problem.grad_clean else ()))
    elsewhere = problem.device.type == "cuda" and problem.device.index != torch.cuda.current_device()
    with torch.cuda.device(problem.device) if elsewhere else nullcontext():
        loss, per_layer = _MSEOverLayers.apply(problem, clean, perturbed, wants, *inputs)  # type: ignore[no-untyped-call]
    return loss, per_layer


class _MSEOverLayers(torch.autograd.Function):
    """loss = sum_l w_l d_l of K layers; gradient 2 w_l scale_l (h' - h) to h', and the negative to h."""

    @staticmethod
    def forward(
        ctx: Any, problem: Problem, clean: list[Tensor], perturbed: list[Tensor], wants: list[bool], *_: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Partial sums and their sum; with `overwrite`, h' - h is left in the clean tensors."""
        table = build_table(problem, clean, perturbed, wants)
        count = len(clean)
        # Groups share the largest grid, so that each row has the same number of partial sums.
        share, programs = share_of(max(g.tiles_selected for g in table.groups), count, settings.SHARE_FORWARD)
        partial = torch.empty(count * programs, dtype=torch.float32, device=problem.device)
        loss = torch.empty((), dtype=torch.float32, device=problem.device)
        per_layer = torch.empty(count, dtype=torch.float32, device=problem.device)
        has_weights = isinstance(problem.weights, Tensor)
        for group in table.groups:
            forward_kernel[(programs, group.count)](
                table.rows, partial, group.first, programs, share, HAS_INDEX=table.has_index, **_options(group)
            )
        reduce_kernel[(1,)](
            table.rows,
            partial,
            problem.weights if has_weights else per_layer,
            loss,
            per_layer,
            count,
            programs,
            HAS_WEIGHTS=has_weights,
            BLOCK_K=_REDUCE_LAYERS,
            BLOCK_P=_REDUCE_PROGRAMS,
            num_warps=8,
        )
        if problem.grad_clean or problem.grad_perturbed:
            for h, overwritten in zip(clean, problem.overwrite, strict=True):
                if overwritten:  # a kernel wrote to it, which autograd cannot see
                    torch.autograd.graph.increment_version(h)
            # Where the difference took the place of h, nothing of h' is needed any more.
            kept = (None if o else t for o, t in zip(problem.overwrite, perturbed, strict=True))
            ctx.save_for_backward(*clean, *kept)
            ctx.problem, ctx.table, ctx.wants = problem, table, wants
        ctx.mark_non_differentiable(per_layer)
        ctx.set_materialize_grads(False)
        return loss, per_layer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        """Writes every element of every gradient once, without looking at a value from the host."""
        if upstream is None:
            return (None,) * len(ctx.needs_input_grad)
        problem: Problem = ctx.problem
        problem.spend()
        count = len(problem.scales)
        clean, kept = list(ctx.saved_tensors[:count]), ctx.saved_tensors[count:]
        table: Table = ctx.table
        if not _points_to(table, clean, kept):  # saved-tensor hooks have put them elsewhere
            perturbed = [h if h_prime is None else h_prime for h, h_prime in zip(clean, kept, strict=True)]
            table = build_table(problem, clean, perturbed, ctx.wants)
        has_weights = isinstance(problem.weights, Tensor)
        mask = _token_mask(table, problem.device)
        to_perturbed: list[Tensor | None] = [None] * count
        to_clean: list[Tensor | None] = [None] * count
        for group in table.groups:
            rows = group.count - group.skip
            if rows == 0:
                continue
            first = group.first + group.skip
            layers = table.order[first : first + rows]
            shapes = [clean[layer].shape for layer in layers]
            into_perturbed = problem.grad_perturbed and not group.overwrite
            gradients = mask.new_empty(group.elements if into_perturbed else 0, dtype=group.perturbed)
            mirrored = mask.new_empty(group.elements if problem.grad_clean else 0, dtype=group.clean)
            share, programs = share_of(group.tiles_all, rows, settings.SHARE_BACKWARD)
            backward_kernel[(programs, rows)](
                table.rows,
                upstream,
                problem.weights if has_weights else upstream,
                mask,
                gradients,
                mirrored,
                first,
                share,
                HAS_WEIGHTS=has_weights,
                HAS_INDEX=table.has_index,
                GRAD_PERTURBED=into_perturbed,
                GRAD_CLEAN=problem.grad_clean,
                **_options(group),
            )
            if group.overwrite:
                _scatter(to_perturbed, layers, (clean[layer].detach() for layer in layers))
            elif into_perturbed:
                _scatter(to_perturbed, layers, _views(gradients, shapes))
            if problem.grad_clean:
                _scatter(to_clean, layers, _views(mirrored, shapes))
        return (
            *(None,) * 4,
            *(to_perturbed if problem.grad_perturbed else ()),
            *(to_clean if problem.grad_clean else ()),
        )


def _describable(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same tensors, with a contiguous copy of those whose leading dimensions do not merge into two."""
    return [
        tensor if tensor.is_contiguous() or collapse(tensor.shape, tensor.stride()) else tensor.contiguous()
        for tensor in tensors
    ]


def _options(group: Group) -> dict[str, Any]:
    """The compile-time arguments that both large kernels share."""
    return {
        "CLEAN": _DTYPES[group.clean],
        "PERTURBED": _DTYPES[group.perturbed],
        "OVERWRITE": group.overwrite,
        "FLAT": group.flat,
        "UNIT": group.unit,
        "ALIGN": group.alignment,
        "VEC": group.vector,
        "BLOCK_N": group.block_n,
        "BLOCK_H": group.block_h,
        "num_warps": settings.WARPS,
    }


def _points_to(table: Table, clean: Sequence[Tensor], kept: Sequence[Tensor | None]) -> bool:
    """Whether the table still has the addresses of these tensors."""
    for row, layer in enumerate(table.order):
        h_prime = kept[layer]
        if table.addresses[2 * row] != clean[layer].data_ptr():
            return False
        if h_prime is not None and table.addresses[2 * row + 1] != h_prime.data_ptr():
            return False
    return True


def _token_mask(table: Table, device: torch.device) -> Tensor:
    """uint8 [mask_size], 1 at the selected positions of each distinct index."""
    mask = torch.zeros(table.mask_size, dtype=torch.uint8, device=device)
    if table.most_selected:
        grid = (triton.cdiv(table.most_selected, _MASK_BLOCK), len(table.order))
        mask_kernel[grid](table.rows, mask, BLOCK_N=_MASK_BLOCK)
    return mask


def _views(buffer: Tensor, shapes: Sequence[torch.Size]) -> Sequence[Tensor]:
    """The buffer cut into contiguous tensors of these shapes, one after the other."""
    if all(shape == shapes[0] for shape in shapes):
        return buffer.view(len(shapes), *shapes[0]).unbind()
    parts = torch.split(buffer, [shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _scatter(into: list[Tensor | None], layers: Sequence[int], gradients: Iterator[Tensor] | Sequence[Tensor]) -> None:
    for layer, gradient in zip(layers, gradients, strict=True):
        into[layer] = gradient
