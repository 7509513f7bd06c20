"""Launches the Triton kernels: one launch forward, one backward, and two tiny ones.

Imports triton, so `mse_over_layers` imports this module only when it is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lfu_reg.distances.kernels import mse_launch
from lfu_reg.distances.kernels import mse_layout as settings
from lfu_reg.distances.kernels.mse_launch import Gradients, views
from lfu_reg.distances.kernels.mse_layout import share_of
from lfu_reg.distances.kernels.mse_problem import Problem
from lfu_reg.distances.kernels.mse_rows import Group
from lfu_reg.distances.kernels.mse_table import Table
from lfu_reg.distances.kernels.mse_triton import backward_kernel, forward_kernel, mask_kernel, reduce_kernel

_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
_REDUCE_LAYERS, _REDUCE_PROGRAMS = 16, 256  # tile of the second reduction
_MASK_BLOCK = 1024


def run(problem: Problem) -> tuple[Tensor, Tensor]:
    """The loss and the per-layer distances of a checked problem, by Triton kernels.

    Raises:
        ValueError: for dtypes that the kernels do not read.
    """
    for _, *dtypes in problem.kinds.looks:
        for dtype in dtypes:
            if dtype not in _DTYPES:
                raise ValueError(
                    f"The Triton kernel reads float16, bfloat16 and float32, not {dtype}; use impl='torch'."
                )
    elsewhere = problem.device.type == "cuda" and problem.device.index != torch.cuda.current_device()
    with torch.cuda.device(problem.device) if elsewhere else nullcontext():
        return mse_launch.run(problem, _Triton())


class _Triton:
    """See `Launcher`."""

    def forward(self, problem: Problem, table: Table) -> tuple[Tensor, Tensor]:
        """Partial sums, and their sum in a fixed order."""
        count, groups, device = len(problem.scales), table.rows.groups, problem.device
        # Groups share the largest grid, so that each row has the same number of partial sums.
        tiles = max(group.tiles(problem.selected) for group in groups)
        share, programs = share_of(tiles, count, settings.SHARE_FORWARD)
        partial = torch.empty(count * programs, dtype=torch.float32, device=device)
        loss = torch.empty((), dtype=torch.float32, device=device)
        per_layer = torch.empty(count, dtype=torch.float32, device=device)
        for group in groups:
            forward_kernel[(programs, group.count)](
                table.values, partial, group.first, programs, share, HAS_INDEX=table.has_index, **_options(group)
            )
        has_weights = isinstance(problem.weights, Tensor)
        reduce_kernel[(1,)](
            table.values,
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
        return loss, per_layer

    def backward(
        self, problem: Problem, table: Table, upstream: Tensor, clean: Sequence[Tensor]
    ) -> tuple[Gradients, Gradients]:
        """One buffer per group of layers, which their gradients are views of."""
        to_perturbed: Gradients = [None] * len(clean)
        to_clean: Gradients = [None] * len(clean)
        has_weights = isinstance(problem.weights, Tensor)
        mask = _token_mask(table, problem.device)
        for group in table.rows.groups:
            rows = group.count - group.skip
            if rows == 0:
                continue
            first = group.first + group.skip
            layers = table.rows.order[first : first + rows]
            shapes = [clean[layer].shape for layer in layers]
            into_perturbed = problem.grad_perturbed and not group.overwrite
            gradients = mask.new_empty(group.elements if into_perturbed else 0, dtype=group.perturbed)
            mirrored = mask.new_empty(group.elements if problem.grad_clean else 0, dtype=group.clean)
            share, programs = share_of(group.tiles(problem.kinds.positions), rows, settings.SHARE_BACKWARD)
            backward_kernel[(programs, rows)](
                table.values,
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
                _scatter(to_perturbed, layers, [clean[layer].detach() for layer in layers])
            elif into_perturbed:
                _scatter(to_perturbed, layers, views(gradients, shapes))
            if problem.grad_clean:
                _scatter(to_clean, layers, views(mirrored, shapes))
        return to_perturbed, to_clean


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


def _token_mask(table: Table, device: torch.device) -> Tensor:
    """uint8 [mask_size], 1 at the selected positions of each distinct index."""
    mask = torch.zeros(table.rows.mask_size, dtype=torch.uint8, device=device)
    if table.most_selected:
        grid = (triton.cdiv(table.most_selected, _MASK_BLOCK), len(table.rows.order))
        mask_kernel[grid](table.values, mask, BLOCK_N=_MASK_BLOCK)
    return mask


def _scatter(into: Gradients, layers: Sequence[int], gradients: Sequence[Tensor]) -> None:
    for layer, gradient in zip(layers, gradients, strict=True):
        into[layer] = gradient
