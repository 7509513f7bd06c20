"""Runs the compiled C++ kernel on CPU tensors: one call forward and one backward for all layers of a pair of dtypes."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from lfu_reg.distances.kernels import mse_launch
from lfu_reg.distances.kernels.mse_compile import library
from lfu_reg.distances.kernels.mse_launch import Gradients, views
from lfu_reg.distances.kernels.mse_layout import WIDTH
from lfu_reg.distances.kernels.mse_problem import Problem
from lfu_reg.distances.kernels.mse_rows import Group
from lfu_reg.distances.kernels.mse_table import Table
from lfu_reg.distances.kernels.mse_torch import combine, factors_of

_ROW_BYTES = 8 * WIDTH
# Gradients of at most this many elements together share one allocation; above, memory of its own is reused sooner.
_SHARED = 1 << 17


def run(problem: Problem) -> tuple[Tensor, Tensor]:
    """The loss and the per-layer distances of a checked problem whose tensors are on the CPU.

    Raises:
        IndexError: if a token index points outside of its layer.
        OSError, subprocess.SubprocessError: where nothing can be compiled, before anything is changed.
    """
    for _, clean, perturbed in problem.kinds.looks:
        library(clean, perturbed)
    problem.index = [
        None if index is None else _ascending(index, positions)
        for index, positions in zip(problem.index, problem.kinds.positions, strict=True)
    ]
    problem.overwrite = [False] * len(problem.layers)
    return mse_launch.run(problem, _Native())


class _Native:
    """See `Launcher`."""

    def forward(self, problem: Problem, table: Table) -> tuple[Tensor, Tensor]:
        """Squared sums in double precision, weighted here."""
        rows = table.rows
        sums = array("d", bytes(8 * len(rows.order)))
        start = sums.buffer_info()[0]
        for group in rows.groups:
            library(group.clean, group.perturbed).forward(
                table.values.data_ptr() + _ROW_BYTES * group.first,
                group.count,
                start + 8 * group.first,
                torch.get_num_threads(),
            )
        per_layer = sums.tolist()
        if not rows.in_order:
            for row, layer in enumerate(rows.order):
                per_layer[layer] = sums[row]
        return combine(per_layer, problem)

    def backward(
        self, problem: Problem, table: Table, upstream: Tensor, clean: Sequence[Tensor]
    ) -> tuple[Gradients, Gradients]:
        """Every element of every gradient is written once."""
        to_perturbed: Gradients = [None] * len(clean)
        to_clean: Gradients = [None] * len(clean)
        factors = factors_of(problem, upstream)
        for group in table.rows.groups:
            first, count = group.first + group.skip, group.count - group.skip
            layers = table.rows.order[first : first + count]
            addresses = []
            for wanted, dtype, found in (
                (problem.grad_perturbed, group.perturbed, to_perturbed),
                (problem.grad_clean, group.clean, to_clean),
            ):
                gradients = _empty(clean, layers, group, dtype) if wanted else []
                for layer, gradient in zip(layers, gradients, strict=bool(gradients)):
                    found[layer] = gradient
                addresses.append(array("q", map(Tensor.data_ptr, gradients) if wanted else bytes(8 * count)))
            each = array("d", [float(factors[layer]) for layer in layers])
            library(group.clean, group.perturbed).backward(
                table.values.data_ptr() + _ROW_BYTES * first,
                count,
                each.buffer_info()[0],
                *(side.buffer_info()[0] for side in addresses),
                torch.get_num_threads(),
            )
        return to_perturbed, to_clean


def _empty(clean: Sequence[Tensor], layers: Sequence[int], group: Group, dtype: torch.dtype) -> Sequence[Tensor]:
    shapes = [clean[layer].shape for layer in layers]
    if shapes and group.elements <= _SHARED:
        return views(torch.empty(group.elements, dtype=dtype), shapes)
    return [torch.empty(shape, dtype=dtype) for shape in shapes]


def _ascending(index: Tensor, positions: int) -> Tensor:
    """The index sorted, which changes neither the sum nor the gradients."""
    if len(index) == 0:
        return index
    if not bool((index[1:] > index[:-1]).all()):
        index = index.sort().values
    first, last = index[0].item(), index[-1].item()
    if first < 0 or last >= positions:
        raise IndexError(f"token_index reaches from {first} to {last}; the layer has positions 0 to {positions - 1}.")
    return index
