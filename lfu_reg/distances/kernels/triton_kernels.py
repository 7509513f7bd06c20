"""Triton kernels of the squared difference over layers, forward and backward.

All layers go into one launch. A table in device memory has one row of int64 numbers per layer (`COLUMNS`), with the
addresses of its two tensors, so nothing is stacked or copied. Launches are two-dimensional: axis 1 is the layer, axis 0
a share of the layer's tiles of BLOCK_N selected positions x BLOCK_H hidden units. Sums are float32, one partial sum per
program and no atomics, so the result is the same in every run. Offsets are int64, so tensors may have more than 2^31
elements.
"""

# Annotations of kernel arguments mean something else to Triton.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from lfu_reg.distances.kernels.table import COLUMNS, WIDTH

_WIDTH: tl.constexpr = tl.constexpr(WIDTH)
_CLEAN: tl.constexpr = tl.constexpr(COLUMNS.index("clean"))
_PERTURBED: tl.constexpr = tl.constexpr(COLUMNS.index("perturbed"))
_INDEX: tl.constexpr = tl.constexpr(COLUMNS.index("index"))
_SELECTED: tl.constexpr = tl.constexpr(COLUMNS.index("selected"))
_POSITIONS: tl.constexpr = tl.constexpr(COLUMNS.index("positions"))
_HIDDEN: tl.constexpr = tl.constexpr(COLUMNS.index("hidden"))
_DIVISOR: tl.constexpr = tl.constexpr(COLUMNS.index("divisor"))
_OFFSET: tl.constexpr = tl.constexpr(COLUMNS.index("offset"))


@triton.jit
def _rows_of_tile(row, numbers, HAS_INDEX: tl.constexpr):
    """The positions with these numbers among the selected ones, which of them to read, and which are no positions.

    Args:
        row: the layer's row of the table.
        numbers: int64 [BLOCK_N].
        HAS_INDEX: whether any layer has a token index.
    """
    selected = tl.load(row + _SELECTED)
    position = numbers
    chosen = numbers < selected
    outside = numbers < 0
    if HAS_INDEX:
        index = tl.load(row + _INDEX)
        listed = numbers < tl.where(index != 0, selected, 0)
        entry = tl.load(index.to(tl.pointer_type(tl.int64)) + numbers, mask=listed, other=0)
        position = tl.where(listed, entry, numbers)
        outside = chosen & ((position < 0) | (position >= tl.load(row + _POSITIONS)))
        chosen = chosen & (outside == 0)
    return position, chosen, outside


@triton.jit
def _difference(row, at, mask, CLEAN: tl.constexpr, PERTURBED: tl.constexpr, ALIGN: tl.constexpr):
    """The difference h' - h in float32 at the elements `at` of a layer, zero where `mask` forbids to read."""
    clean = tl.multiple_of(tl.load(row + _CLEAN).to(tl.pointer_type(CLEAN)), ALIGN)
    perturbed = tl.multiple_of(tl.load(row + _PERTURBED).to(tl.pointer_type(PERTURBED)), ALIGN)
    h = tl.load(clean + at, mask=mask, other=0.0).to(tl.float32)
    return tl.load(perturbed + at, mask=mask, other=0.0).to(tl.float32) - h


@triton.jit
def forward_kernel(
    table_ptr,  # int64 [K, WIDTH]: the layers
    partial_ptr,  # float32 [K, programs]: out, what each program adds to its layer's distance
    programs,  # programs per layer, the size of axis 0
    share,  # tiles per program
    CLEAN: tl.constexpr,  # dtype of h
    PERTURBED: tl.constexpr,  # dtype of h'
    HAS_INDEX: tl.constexpr,  # whether any layer has a token index
    ALIGN: tl.constexpr,  # bytes that divide every tensor's address
    VEC: tl.constexpr,  # elements that divide every hidden size
    BLOCK_N: tl.constexpr,  # positions per tile
    BLOCK_H: tl.constexpr,  # hidden units per tile
):
    """Reads h and h' once at the selected positions and nothing else."""
    layer = tl.program_id(1)
    row = table_ptr + layer * _WIDTH
    hidden = tl.multiple_of(tl.load(row + _HIDDEN), VEC)
    across = tl.cdiv(hidden, BLOCK_H)
    begin = tl.program_id(0).to(tl.int64) * share
    end = tl.minimum(begin + share, tl.cdiv(tl.load(row + _SELECTED), BLOCK_N) * across)

    total = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    for tile in range(begin, end):
        numbers = (tile // across) * BLOCK_N + tl.arange(0, BLOCK_N)
        columns = (tile % across).to(tl.int32) * BLOCK_H + tl.arange(0, BLOCK_H)
        position, chosen, outside = _rows_of_tile(row, numbers, HAS_INDEX)
        mask = chosen[:, None] & (columns < hidden)[None, :]
        difference = _difference(row, position[:, None] * hidden + columns[None, :], mask, CLEAN, PERTURBED, ALIGN)
        if HAS_INDEX:
            # What is no position poisons the sum, as looking from the host would stall the stream.
            difference = tl.where(outside[:, None], float("nan"), difference)
        total += difference * difference
    # A program without a tile stores its zero: every partial sum is written.
    value = tl.sum(tl.sum(total, axis=1), axis=0) / tl.load(row + _DIVISOR).to(tl.float32)
    tl.store(partial_ptr + layer.to(tl.int64) * programs + tl.program_id(0), value)


@triton.jit
def backward_kernel(
    table_ptr,  # int64 [K, WIDTH]: the layers
    upstream_ptr,  # float32 [K]: gradient of the distances
    to_clean_ptr,  # dtype of h: out, the gradients of the h at their offsets, each [positions, H_l] contiguous
    to_perturbed_ptr,  # dtype of h': out, the same for h'
    share,
    CLEAN: tl.constexpr,
    PERTURBED: tl.constexpr,
    GRAD_CLEAN: tl.constexpr,  # whether any h gets a gradient
    GRAD_PERTURBED: tl.constexpr,  # whether any h' does
    HAS_INDEX: tl.constexpr,
    ALIGN: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """2/divisor_l upstream_l (h' - h) at the selected positions; nothing is written elsewhere."""
    layer = tl.program_id(1)
    row = table_ptr + layer * _WIDTH
    hidden = tl.multiple_of(tl.load(row + _HIDDEN), VEC)
    offset = tl.load(row + _OFFSET)
    wanted = offset >= 0
    offset = tl.multiple_of(offset, VEC)
    factor = 2.0 * tl.load(upstream_ptr + layer) / tl.load(row + _DIVISOR).to(tl.float32)
    across = tl.cdiv(hidden, BLOCK_H)
    begin = tl.program_id(0).to(tl.int64) * share
    end = tl.minimum(begin + share, tl.cdiv(tl.load(row + _SELECTED), BLOCK_N) * across)

    for tile in range(begin, tl.where(wanted, end, begin)):
        numbers = (tile // across) * BLOCK_N + tl.arange(0, BLOCK_N)
        columns = (tile % across).to(tl.int32) * BLOCK_H + tl.arange(0, BLOCK_H)
        position, chosen, _ = _rows_of_tile(row, numbers, HAS_INDEX)
        mask = chosen[:, None] & (columns < hidden)[None, :]
        at = position[:, None] * hidden + columns[None, :]
        gradient = factor * _difference(row, at, mask, CLEAN, PERTURBED, ALIGN)
        if GRAD_CLEAN:
            tl.store(to_clean_ptr + (offset + at), (-gradient).to(CLEAN), mask=mask)
        if GRAD_PERTURBED:
            tl.store(to_perturbed_ptr + (offset + at), gradient.to(PERTURBED), mask=mask)
