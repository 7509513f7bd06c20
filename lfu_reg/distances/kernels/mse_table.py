"""The table of layers that the kernels of one call read: reused rows, with what is new at this call filled in."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import chain
from operator import or_
from typing import TypeVar

import torch
from torch import Tensor

from lfu_reg.distances.kernels.mse_layout import FIELDS, WIDTH
from lfu_reg.distances.kernels.mse_problem import Problem
from lfu_reg.distances.kernels.mse_rows import Rows, Strides, lay_out

_T = TypeVar("_T")
_COLUMN = {name: slice(number, None, WIDTH) for number, name in enumerate(FIELDS)}


@dataclass(slots=True)
class Table:
    """The rows on the device, and what the host has to know about them.

    Attributes:
        values: int64 [K, width], flat.
        rows: what is the same at every call.
        addresses: of the K clean and the K perturbed tensors.
        has_index: whether any layer has an index.
        most_selected: selected positions of the layer with the longest index.
    """

    values: Tensor
    rows: Rows
    addresses: list[int]
    has_index: bool
    most_selected: int

    def points_to(self, clean: Sequence[Tensor], perturbed: Sequence[Tensor | None]) -> bool:
        """Whether these are the tensors it has the addresses of; None stands for one that is not read any more."""
        count = len(clean)
        expected = self.addresses
        if list(map(Tensor.data_ptr, clean)) != expected[:count]:
            return False
        pairs = zip(perturbed, expected[count:], strict=True)
        return all(tensor is None or tensor.data_ptr() == address for tensor, address in pairs)


def strides_of(clean: Sequence[Tensor], perturbed: Sequence[Tensor]) -> tuple[Strides, Strides] | None:
    """The strides of every tensor, or None if all are contiguous."""
    if all(map(Tensor.is_contiguous, chain(clean, perturbed))):
        return None
    return tuple(map(Tensor.stride, clean)), tuple(map(Tensor.stride, perturbed))


def build_table(
    problem: Problem,
    clean: Sequence[Tensor],
    perturbed: Sequence[Tensor],
    wants: tuple[bool, ...],
    strides: tuple[Strides, Strides] | None,
) -> Table:
    """Describe the layers of a problem to the kernels: one copy to the device, without waiting for it.

    Args:
        problem: what is asked; its own lists of tensors are not looked at.
        clean: K tensors whose leading dimensions `collapse` can describe.
        perturbed: the same. Of layers that are overwritten, the clean tensor may stand in for it.
        wants: whether the layer gets a gradient, on any side.
        strides: see `strides_of`.
    """
    addresses = list(map(Tensor.data_ptr, chain(clean, perturbed)))
    aligned = reduce(or_, addresses) % 16 == 0
    rows = lay_out(problem.kinds, strides, wants, tuple(problem.overwrite), aligned)

    values = rows.template[:]
    count = len(clean)
    values[_COLUMN["clean"]] = array("q", _in_rows(addresses[:count], rows))
    values[_COLUMN["perturbed"]] = array("q", _in_rows(addresses[count:], rows))
    values[_COLUMN["scale"]] = _float_bits(_in_rows(problem.scales, rows))
    if not isinstance(problem.weights, Tensor):
        values[_COLUMN["weight"]] = _float_bits(_in_rows(problem.weights, rows))
    selected, index = problem.selected, problem.index
    has_index = any(entry is not None for entry in index)
    if has_index:
        address_of = [0 if entry is None else entry.data_ptr() for entry in index]
        values[_COLUMN["index"]] = array("q", [address_of[kind] for kind in rows.of_row])
        values[_COLUMN["selected"]] = array("q", [selected[kind] for kind in rows.of_row])
    return Table(
        values=_to_device(values, problem.device),
        rows=rows,
        addresses=addresses,
        has_index=has_index,
        most_selected=max(n for n, entry in zip(selected, index, strict=True) if entry is not None) if has_index else 0,
    )


def _in_rows(values: list[_T], rows: Rows) -> list[_T]:
    """Values per layer in the order of the rows."""
    return values if rows.in_order else [values[layer] for layer in rows.order]


def _float_bits(numbers: list[float]) -> array[int]:
    """The bits of the nearest float32 of each number, as int64."""
    return array("q", array("i", array("f", numbers).tobytes()))


def _to_device(values: array[int], device: torch.device) -> Tensor:
    host = torch.frombuffer(values, dtype=torch.int64)
    if device.type != "cuda":
        return host
    # From pinned memory the copy is queued; from ordinary memory it may wait for the stream.
    return torch.empty(len(values), dtype=torch.int64, pin_memory=True).copy_(host).to(device, non_blocking=True)
