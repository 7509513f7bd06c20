"""The table of layers that the Triton kernels read, and the launch settings that follow from it."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from lfu_reg.kernels.mse_layout import (
    TILE,
    TILE_MIXED,
    TILE_STRIDED,
    TILE_UNALIGNED,
    block_width,
    collapse,
    float_bits,
)
from lfu_reg.kernels.mse_problem import Problem


@dataclass(frozen=True, slots=True)
class Group:
    """Consecutive rows of the table that one launch can take: layers with the same dtypes.

    Attributes:
        first: first row.
        count: number of rows.
        skip: how many of them, the first ones, get no gradient at all.
        elements: of the gradients of the others together.
        clean: dtype of h.
        perturbed: dtype of h'.
        overwrite: whether h' - h is written over h.
        flat: whether one stride covers the leading dimensions of every tensor.
        unit: whether every hidden dimension is contiguous.
        aligned: whether 16-byte accesses fit every tensor.
        block_n: positions per tile.
        block_h: hidden units per tile.
        tiles_selected: most tiles that the selected positions of one layer have.
        tiles_all: most tiles that all positions of one layer have.
    """

    first: int
    count: int
    skip: int
    elements: int
    clean: torch.dtype
    perturbed: torch.dtype
    overwrite: bool
    flat: bool
    unit: bool
    aligned: bool
    block_n: int
    block_h: int
    tiles_selected: int
    tiles_all: int

    @property
    def vector(self) -> int:
        """Elements of the narrower dtype in 16 bytes if the group is aligned, else 1."""
        return 16 // min(self.clean.itemsize, self.perturbed.itemsize) if self.aligned else 1

    @property
    def alignment(self) -> int:
        """Bytes that divide the address of every tensor."""
        return 16 if self.aligned else min(self.clean.itemsize, self.perturbed.itemsize)


@dataclass(slots=True)
class Table:
    """The rows on the device, and what the host has to know about them.

    Attributes:
        rows: int64 [K, width], flat.
        groups: what is launched together.
        order: the layer of each row.
        offsets: of each row's gradient in its group's buffer, in elements.
        addresses: of the tensors that the rows point to, h and h' in turn.
        has_index: whether any layer has an index.
        mask_size: number of positions in all token masks together.
        most_selected: selected positions of the layer with the longest index.
    """

    rows: Tensor
    groups: list[Group]
    order: list[int]
    offsets: list[int]
    addresses: list[int]
    has_index: bool
    mask_size: int
    most_selected: int


@dataclass(slots=True)
class _Kind:
    """What layers of one shape, index and layout have in common.

    Attributes:
        columns: of the table, from `scale` on.
        bucket: the layers of the kind's group that get no gradient, and those that do.
        mask: offset of the token mask, -1 for none.
        mask_owner: the layer that fills it, -1 if that is one of another kind.
        flat, unit: see `Group`.
        strides_aligned: whether 16-byte accesses fit the strides and the hidden size.
        elements: of one tensor.
        selected, positions, hidden: sizes.
    """

    columns: tuple[int, ...]
    bucket: tuple[list[int], list[int]]
    mask: int
    mask_owner: int
    flat: bool
    unit: bool
    strides_aligned: bool
    elements: int
    selected: int
    positions: int
    hidden: int


def build_table(problem: Problem, clean: Sequence[Tensor], perturbed: Sequence[Tensor], wants: Sequence[bool]) -> Table:
    """Describe the layers of a problem to the kernels: one copy to the device, without waiting for it.

    Args:
        problem: what is asked; its own lists of tensors are not looked at.
        clean: K tensors whose leading dimensions `collapse` can describe.
        perturbed: the same. Of layers that are overwritten, the clean tensor may stand in for it.
        wants: whether the layer gets a gradient, on any side.
    """
    table = Table(torch.empty(0), [], [], [], [], any(i is not None for i in problem.index), 0, 0)
    masks: dict[tuple[int, int], int] = {}
    kinds: dict[object, _Kind] = {}
    of_layer: list[_Kind] = []
    buckets: dict[tuple[torch.dtype, torch.dtype, bool], tuple[list[int], list[int]]] = {}
    for layer, h in enumerate(clean):
        h_prime, overwrite = perturbed[layer], problem.overwrite[layer]
        key: object = (problem.kinds[layer], overwrite)
        if not (h.is_contiguous() and h_prime.is_contiguous()):
            key = (key, h.stride(), h_prime.stride())
        kind = kinds.get(key)
        if kind is None:
            bucket = buckets.setdefault((h.dtype, h_prime.dtype, overwrite), ([], []))
            kind = kinds[key] = _kind(h, h_prime, problem.index[layer], problem.scales[layer], bucket, layer)
            _assign_mask(kind, problem.index[layer], masks, table)
        kind.bucket[wants[layer]].append(layer)
        of_layer.append(kind)

    weights = problem.weights
    if isinstance(weights, Tensor):
        weight_bits = [0] * len(clean)
    else:
        bits_of = {w: float_bits(w) for w in set(weights)}
        weight_bits = [bits_of[w] for w in weights]
    values: list[int] = []
    for dtypes_and_mode, (unwanted, wanted) in buckets.items():
        first, offset, address_bits = len(table.order), 0, 0
        for layer in (*unwanted, *wanted):
            kind = of_layer[layer]
            address, address_prime = clean[layer].data_ptr(), perturbed[layer].data_ptr()
            address_bits |= address | address_prime
            table.addresses += (address, address_prime)
            owns_mask = int(layer == kind.mask_owner)
            values += (address, address_prime, layer, offset, weight_bits[layer], owns_mask, kind.mask, *kind.columns)
            table.order.append(layer)
            table.offsets.append(offset)
            if wants[layer] and not problem.overwrite[layer]:
                offset += kind.elements
        members = [kind for kind in kinds.values() if kind.bucket is buckets[dtypes_and_mode]]
        table.groups.append(_group(first, len(unwanted), len(wanted), offset, dtypes_and_mode, address_bits, members))
    table.rows = _to_device(values, problem.device)
    return table


def _kind(
    h: Tensor, h_prime: Tensor, index: Tensor | None, scale: float, bucket: tuple[list[int], list[int]], layer: int
) -> _Kind:
    positions, hidden = prod(h.shape[:-1]), h.shape[-1]
    selected = positions if index is None else len(index)
    access, access_prime = collapse(h.shape, h.stride()), collapse(h.shape, h_prime.stride())
    assert access is not None
    assert access_prime is not None
    vector = 16 // min(h.element_size(), h_prime.element_size())
    strides = (hidden, access[1], access[2], access_prime[1], access_prime[2])
    address = 0 if index is None else index.data_ptr()
    return _Kind(
        columns=(float_bits(scale), hidden, positions, selected, address, *access, *access_prime),
        bucket=bucket,
        mask=-1,
        mask_owner=layer,
        flat=access[1] == 0 and access_prime[1] == 0,
        unit=access[3] == 1 and access_prime[3] == 1,
        strides_aligned=all(stride % vector == 0 for stride in strides),
        elements=positions * hidden,
        selected=selected,
        positions=positions,
        hidden=hidden,
    )


def _assign_mask(kind: _Kind, index: Tensor | None, masks: dict[tuple[int, int], int], table: Table) -> None:
    """Layers with the same index and number of positions share a token mask."""
    if index is None:
        kind.mask_owner = -1
        return
    known = masks.get((id(index), kind.positions))
    if known is not None:
        kind.mask, kind.mask_owner = known, -1
        return
    kind.mask = masks[id(index), kind.positions] = table.mask_size
    table.mask_size += kind.positions
    table.most_selected = max(table.most_selected, kind.selected)


def _group(
    first: int,
    unwanted: int,
    wanted: int,
    elements: int,
    dtypes_and_mode: tuple[torch.dtype, torch.dtype, bool],
    address_bits: int,
    kinds: list[_Kind],
) -> Group:
    clean, perturbed, overwrite = dtypes_and_mode
    unit = all(kind.unit for kind in kinds)
    aligned = unit and address_bits % 16 == 0 and all(kind.strides_aligned for kind in kinds)
    flat = all(kind.flat for kind in kinds)
    if aligned:
        tile = TILE if clean == perturbed else TILE_MIXED
    else:
        tile = TILE_UNALIGNED if flat and unit else TILE_STRIDED
    block_h = block_width(max(kind.hidden for kind in kinds), tile)
    block_n = tile // block_h
    return Group(
        first=first,
        count=unwanted + wanted,
        skip=unwanted,
        elements=elements,
        clean=clean,
        perturbed=perturbed,
        overwrite=overwrite,
        flat=flat,
        unit=unit,
        aligned=aligned,
        block_n=block_n,
        block_h=block_h,
        tiles_selected=max(-(-kind.selected // block_n) * -(-kind.hidden // block_h) for kind in kinds),
        tiles_all=max(-(-kind.positions // block_n) * -(-kind.hidden // block_h) for kind in kinds),
    )


def _to_device(values: list[int], device: torch.device) -> Tensor:
    host = torch.frombuffer(array("q", values), dtype=torch.int64)
    if device.type != "cuda":
        return host
    # From pinned memory the copy is queued; from ordinary memory it may wait for the stream.
    return torch.empty(len(values), dtype=torch.int64, pin_memory=True).copy_(host).to(device, non_blocking=True)
