"""The table of layers that the Triton kernels read: one row of int64 numbers per layer, in device memory."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from lfu_reg.distances.kernels.problem import Problem

COLUMNS = (
    "clean",  # address of h
    "perturbed",  # address of h'
    "index",  # address of the int64 selected positions, 0 for all
    "selected",  # N_l
    "positions",  # number of positions in the tensors
    "hidden",  # H_l
    "divisor",  # N_l H_l or N_l
    "offset",  # of the layer's gradient in the gradient buffer, in elements; -1 where no gradient is wanted
)
WIDTH = len(COLUMNS)


@dataclass(frozen=True, slots=True)
class Table:
    """The rows on the device, and what the host has to know about them.

    Attributes:
        values: int64 [K, WIDTH].
        aligned: whether 16-byte accesses fit every tensor, index or gradient.
        has_index: whether any layer has a token index.
        hidden: the hidden size of each layer.
        elements: of the wanted gradients together.
    """

    values: Tensor
    aligned: bool
    has_index: bool
    hidden: list[int]
    elements: int


def build_table(
    problem: Problem, clean: Sequence[Tensor], perturbed: Sequence[Tensor], wanted: Sequence[bool]
) -> Table:
    """Describe the layers of a problem to the kernels: one copy to the device, without waiting for it.

    Args:
        problem: what is asked.
        clean: K contiguous tensors.
        perturbed: the same.
        wanted: whether the layer gets a gradient, on any side.
    """
    sizes = [h.numel() if want else 0 for h, want in zip(clean, wanted, strict=True)]
    hidden = [h.shape[-1] for h in clean]
    columns = (
        [h.data_ptr() for h in clean],
        [h_prime.data_ptr() for h_prime in perturbed],
        [0 if index is None else index.data_ptr() for index in problem.index],
        problem.selected,
        [h.numel() // max(1, h.shape[-1]) for h in clean],
        hidden,
        problem.divisors,
        [at if want else -1 for at, want in zip(accumulate(sizes, initial=0), wanted, strict=False)],
    )
    per_16_bytes = 16 // min(dtype.itemsize for dtype in problem.dtypes)
    values = array("q")
    for row in zip(*columns, strict=True):
        values.extend(row)
    return Table(
        values=_to_device(values, problem.device),
        aligned=all(at % 16 == 0 for at in (*columns[0], *columns[1])) and all(n % per_16_bytes == 0 for n in hidden),
        has_index=any(index is not None for index in problem.index),
        hidden=hidden,
        elements=sum(sizes),
    )


def _to_device(values: array[int], device: torch.device) -> Tensor:
    host = torch.frombuffer(values, dtype=torch.int64).view(-1, WIDTH)
    if device.type != "cuda":
        return host
    # From pinned memory the copy is queued; from ordinary memory it may wait for the stream.
    return torch.empty_like(host, pin_memory=True).copy_(host).to(device, non_blocking=True)
