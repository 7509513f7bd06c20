"""The rows of the table of layers, as far as they follow from shapes and strides: worked out once, then reused.

Addresses, weights and token indices are new at every call; `mse_table` fills them in.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch

from lfu_reg.distances.kernels import mse_layout as sizes
from lfu_reg.distances.kernels.mse_kinds import Kinds
from lfu_reg.distances.kernels.mse_layout import FIELDS, block_width, collapse, contiguous_strides

Strides = tuple[tuple[int, ...], ...]


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
        sizes: for each kind of layer in the group, its number and hidden size.
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
    sizes: tuple[tuple[int, int], ...]

    def tiles(self, positions: Sequence[int]) -> int:
        """Most tiles that one layer has, given the number of positions of each kind."""
        return max(-(-positions[kind] // self.block_n) * -(-hidden // self.block_h) for kind, hidden in self.sizes)

    @property
    def vector(self) -> int:
        """Elements of the narrower dtype in 16 bytes if the group is aligned, else 1."""
        return 16 // min(self.clean.itemsize, self.perturbed.itemsize) if self.aligned else 1

    @property
    def alignment(self) -> int:
        """Bytes that divide the address of every tensor."""
        return 16 if self.aligned else min(self.clean.itemsize, self.perturbed.itemsize)


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """What is the same at every call with layers of these shapes and strides.

    Attributes:
        template: int64 [K, width], flat, with zeros where calls differ.
        groups: what is launched together.
        order: the layer of each row.
        in_order: whether that is simply 0 .. K-1.
        of_row: the kind of each row.
        mask_size: number of positions in all token masks together.
    """

    template: array[int]
    groups: tuple[Group, ...]
    order: tuple[int, ...]
    in_order: bool
    of_row: tuple[int, ...]
    mask_size: int


@dataclass(frozen=True, slots=True)
class _Access:
    """How the two tensors of a layer are read.

    Attributes:
        columns: inner size and outer, inner and hidden stride of h, then of h'.
        flat, unit: see `Group`.
        aligned: whether 16-byte accesses fit the strides and the hidden size.
    """

    columns: tuple[int, ...]
    flat: bool
    unit: bool
    aligned: bool


@lru_cache(maxsize=64)
def lay_out(
    kinds: Kinds,
    strides: tuple[Strides, Strides] | None,
    wants: tuple[bool, ...],
    overwrite: tuple[bool, ...],
    aligned: bool,
) -> Rows:
    """Order K layers into rows and groups.

    Args:
        kinds: what they look like.
        strides: of the K clean and the K perturbed tensors, such that `collapse` can describe them; None if all of them
            are contiguous.
        wants: whether the layer gets a gradient, on any side.
        overwrite: whether h' - h is written over h.
        aligned: whether 16 divides every address.
    """
    accesses = [_access(kinds, layer, strides) for layer in range(len(kinds.of_layer))]
    masks, mask_size = _masks(kinds)
    buckets: dict[tuple[torch.dtype, torch.dtype, bool], tuple[list[int], list[int]]] = {}
    for layer, kind in enumerate(kinds.of_layer):
        bucket = buckets.setdefault((*kinds.looks[kind][1:], overwrite[layer]), ([], []))
        bucket[wants[layer]].append(layer)

    template = array("q")
    groups: list[Group] = []
    order: list[int] = []
    owned: set[int] = set()
    for (clean, perturbed, overwritten), (unwanted, wanted) in buckets.items():
        members = [*unwanted, *wanted]
        elements = [_elements(kinds, layer) if layer in wanted and not overwritten else 0 for layer in members]
        offsets = list(accumulate(elements, initial=0))
        groups.append(
            _group(
                kinds,
                [accesses[layer] for layer in members],
                dict.fromkeys(kinds.of_layer[layer] for layer in members),
                first=len(order),
                count=len(members),
                skip=len(unwanted),
                elements=offsets[-1],
                clean=clean,
                perturbed=perturbed,
                overwrite=overwritten,
                aligned=aligned,
            )
        )
        for layer, offset in zip(members, offsets[:-1], strict=True):
            kind = kinds.of_layer[layer]
            mask = masks[kind]
            row = dict.fromkeys(FIELDS, 0) | {
                "slot": layer,
                "offset": offset,
                "mask": mask,
                "owns_mask": int(mask >= 0 and mask not in owned),
                "hidden": kinds.hidden[kind],
                "positions": kinds.positions[kind],
                "selected": kinds.positions[kind],
            }
            row |= dict(zip(FIELDS[FIELDS.index("clean_inner") :], accesses[layer].columns, strict=True))
            owned.add(mask)
            template.extend(row.values())
        order += members
    return Rows(
        template=template,
        groups=tuple(groups),
        order=tuple(order),
        in_order=order == list(range(len(order))),
        of_row=tuple(kinds.of_layer[layer] for layer in order),
        mask_size=mask_size,
    )


def _elements(kinds: Kinds, layer: int) -> int:
    kind = kinds.of_layer[layer]
    return kinds.positions[kind] * kinds.hidden[kind]


def _access(kinds: Kinds, layer: int, strides: tuple[Strides, Strides] | None) -> _Access:
    kind = kinds.of_layer[layer]
    shape, dtype, dtype_perturbed = kinds.looks[kind]
    if strides is None:
        h = h_prime = collapse(shape, contiguous_strides(shape))
    else:
        h, h_prime = (collapse(shape, side[layer]) for side in strides)
    assert h is not None
    assert h_prime is not None
    vector = 16 // min(dtype.itemsize, dtype_perturbed.itemsize)
    return _Access(
        columns=(*h, *h_prime),
        flat=h[1] == 0 and h_prime[1] == 0,
        unit=h[3] == 1 and h_prime[3] == 1,
        aligned=all(step % vector == 0 for step in (kinds.hidden[kind], *h[1:3], *h_prime[1:3])),
    )


def _masks(kinds: Kinds) -> tuple[list[int], int]:
    """Per kind the offset of its token mask, -1 for none; kinds with one index and number of positions share it."""
    known: dict[tuple[int, int], int] = {}
    size = 0
    offsets = []
    for key in zip(kinds.index, kinds.positions, strict=True):
        if key[0] >= 0 and key not in known:
            known[key] = size
            size += key[1]
        offsets.append(known.get(key, -1))
    return offsets, size


def _group(
    kinds: Kinds,
    accesses: Sequence[_Access],
    members: Iterable[int],
    *,
    first: int,
    count: int,
    skip: int,
    elements: int,
    clean: torch.dtype,
    perturbed: torch.dtype,
    overwrite: bool,
    aligned: bool,
) -> Group:
    unit, flat = all(access.unit for access in accesses), all(access.flat for access in accesses)
    aligned = aligned and unit and all(access.aligned for access in accesses)
    if aligned:
        tile = sizes.TILE if clean == perturbed else sizes.TILE_MIXED
    else:
        tile = sizes.TILE_UNALIGNED if flat and unit else sizes.TILE_STRIDED
    by_kind = tuple((kind, kinds.hidden[kind]) for kind in members)
    block_h = block_width(max(hidden for _, hidden in by_kind), tile)
    return Group(
        first=first,
        count=count,
        skip=skip,
        elements=elements,
        clean=clean,
        perturbed=perturbed,
        overwrite=overwrite,
        flat=flat,
        unit=unit,
        aligned=aligned,
        block_n=tile // block_h,
        block_h=block_h,
        sizes=by_kind,
    )
