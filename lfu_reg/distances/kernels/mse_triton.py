"""Triton kernels of the squared difference over layers: forward, its second reduction, token mask, backward.

All layers go into one launch. A table in device memory has one row of int64 numbers per layer (`FIELDS`), with the
addresses of its two tensors, so nothing is stacked or copied. Launches are two-dimensional: axis 1 is the layer, axis 0
a share of the layer's tiles of BLOCK_N positions x BLOCK_H hidden units. Sums are float32, one partial sum per
program, added by a second small kernel in a fixed order: no atomics, so the result is the same in every run.
Offsets are int64 throughout, so tensors may have more than 2^31 elements.

This module imports triton; `mse_launch` is its only user.
"""

# Annotations of kernel arguments mean something else to Triton.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from lfu_reg.distances.kernels.mse_layout import FIELDS, WIDTH

_WIDTH: tl.constexpr = tl.constexpr(WIDTH)
_CLEAN: tl.constexpr = tl.constexpr(FIELDS.index("clean"))
_PERTURBED: tl.constexpr = tl.constexpr(FIELDS.index("perturbed"))
_SLOT: tl.constexpr = tl.constexpr(FIELDS.index("slot"))
_OFFSET: tl.constexpr = tl.constexpr(FIELDS.index("offset"))
_WEIGHT: tl.constexpr = tl.constexpr(FIELDS.index("weight"))
_SCALE: tl.constexpr = tl.constexpr(FIELDS.index("scale"))
_HIDDEN: tl.constexpr = tl.constexpr(FIELDS.index("hidden"))
_POSITIONS: tl.constexpr = tl.constexpr(FIELDS.index("positions"))
_SELECTED: tl.constexpr = tl.constexpr(FIELDS.index("selected"))
_INDEX: tl.constexpr = tl.constexpr(FIELDS.index("index"))
_MASK: tl.constexpr = tl.constexpr(FIELDS.index("mask"))
_OWNS_MASK: tl.constexpr = tl.constexpr(FIELDS.index("owns_mask"))
_CLEAN_STRIDES: tl.constexpr = tl.constexpr(FIELDS.index("clean_inner"))
_PERTURBED_STRIDES: tl.constexpr = tl.constexpr(FIELDS.index("perturbed_inner"))


@triton.jit
def _as_float(bits):
    """The float32 whose bits are in the low half of an int64."""
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _tile_pointers(base, strides, positions, columns, FLAT: tl.constexpr, UNIT: tl.constexpr, VEC: tl.constexpr):
    """Addresses of the tile `positions` x `columns` of a tensor.

    Args:
        base: address of the tensor.
        strides: [4] inner size, outer, inner and hidden stride of its table row.
        positions: int64 [BLOCK_N].
        columns: int32 [BLOCK_H].
        FLAT: whether one stride covers all leading dimensions, which saves the division.
        UNIT: whether the hidden dimension is contiguous.
        VEC: number of elements that divides all strides.
    """
    inner_stride = tl.multiple_of(tl.load(strides + 2), VEC)
    if FLAT:
        rows = positions * inner_stride
    else:
        inner = tl.load(strides)
        outer_stride = tl.multiple_of(tl.load(strides + 1), VEC)
        rows = (positions // inner) * outer_stride + (positions % inner) * inner_stride
    if UNIT:
        return base + (rows[:, None] + columns[None, :])
    return base + (rows[:, None] + columns[None, :].to(tl.int64) * tl.load(strides + 3))


@triton.jit
def forward_kernel(
    table_ptr,  # int64 [K, WIDTH]: the layers
    partial_ptr,  # float32 [K, programs]: out, sum of squares of each program
    first,  # row of the table that axis 1 starts from
    programs,  # programs per layer, the size of axis 0
    share,  # tiles per program
    CLEAN: tl.constexpr,  # dtype of h
    PERTURBED: tl.constexpr,  # dtype of h'
    HAS_INDEX: tl.constexpr,  # whether any layer has a token index
    OVERWRITE: tl.constexpr,  # whether h' - h is written over h
    FLAT: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGN: tl.constexpr,  # bytes that divide every tensor's address
    VEC: tl.constexpr,  # elements that divide every stride and hidden size
    BLOCK_N: tl.constexpr,  # positions per tile
    BLOCK_H: tl.constexpr,  # hidden units per tile
):
    """Reads h and h' once at the selected positions and nothing else."""
    program = tl.program_id(0)
    layer = first + tl.program_id(1)
    row = table_ptr + layer * _WIDTH
    clean = tl.multiple_of(tl.load(row + _CLEAN).to(tl.pointer_type(CLEAN)), ALIGN)
    perturbed = tl.multiple_of(tl.load(row + _PERTURBED).to(tl.pointer_type(PERTURBED)), ALIGN)
    hidden = tl.multiple_of(tl.load(row + _HIDDEN), VEC)
    positions = tl.load(row + _POSITIONS)
    selected = tl.load(row + _SELECTED)
    across = tl.cdiv(hidden, BLOCK_H)
    begin = program.to(tl.int64) * share
    end = tl.minimum(begin + share, tl.cdiv(selected, BLOCK_N) * across)

    total = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    for tile in range(begin, end):
        n = (tile // across) * BLOCK_N + tl.arange(0, BLOCK_N)
        columns = (tile % across).to(tl.int32) * BLOCK_H + tl.arange(0, BLOCK_H)
        chosen = n < selected
        position = n
        outside = n < 0
        if HAS_INDEX:
            index = tl.load(row + _INDEX)
            listed = n < tl.where(index != 0, selected, 0)
            entry = tl.load(index.to(tl.pointer_type(tl.int64)) + n, mask=listed, other=0)
            position = tl.where(listed, entry, n)
            # Never read for these; they poison the sum instead, as looking from the host would stall the stream.
            outside = chosen & ((position < 0) | (position >= positions))
            chosen = chosen & (outside == 0)
        mask = chosen[:, None] & (columns < hidden)[None, :]
        h_at = _tile_pointers(clean, row + _CLEAN_STRIDES, position, columns, FLAT, UNIT, VEC)
        h_prime_at = _tile_pointers(perturbed, row + _PERTURBED_STRIDES, position, columns, FLAT, UNIT, VEC)
        h = tl.load(h_at, mask=mask, other=0.0).to(tl.float32)
        h_prime = tl.load(h_prime_at, mask=mask, other=0.0).to(tl.float32)
        difference = h_prime - h
        if OVERWRITE:
            tl.store(h_at, difference.to(CLEAN), mask=mask)
        if HAS_INDEX:
            difference = tl.where(outside[:, None], float("nan"), difference)
        total += difference * difference
    # A program without a tile stores its zero: every partial sum is written.
    tl.store(partial_ptr + layer.to(tl.int64) * programs + program, tl.sum(tl.sum(total, axis=1), axis=0))


@triton.jit
def reduce_kernel(
    table_ptr,  # int64 [K, WIDTH]: the layers
    partial_ptr,  # float32 [K, programs]: sums of squares
    weights_ptr,  # float32 [K]: w_l, unless they are in the table
    loss_ptr,  # float32 []: out, sum_l w_l d_l
    per_layer_ptr,  # float32 [K]: out, d_l
    count,  # K
    programs,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK_K: tl.constexpr,  # layers at a time
    BLOCK_P: tl.constexpr,  # partial sums at a time
):
    """One program adds all partial sums in a fixed order."""
    loss = tl.zeros([BLOCK_K], tl.float32)
    for start in range(0, count, BLOCK_K):
        layer = start + tl.arange(0, BLOCK_K)
        exists = layer < count
        total = tl.zeros([BLOCK_K, BLOCK_P], tl.float32)
        for begin in range(0, programs, BLOCK_P):
            program = begin + tl.arange(0, BLOCK_P)
            at = partial_ptr + layer[:, None].to(tl.int64) * programs + program[None, :]
            total += tl.load(at, mask=exists[:, None] & (program < programs)[None, :], other=0.0)
        row = table_ptr + layer * _WIDTH
        scale = _as_float(tl.load(row + _SCALE, mask=exists, other=0))
        slot = tl.load(row + _SLOT, mask=exists, other=0)
        if HAS_WEIGHTS:
            weight = tl.load(weights_ptr + slot, mask=exists, other=0.0)
        else:
            weight = _as_float(tl.load(row + _WEIGHT, mask=exists, other=0))
        distance = tl.sum(total, axis=1) * scale
        tl.store(per_layer_ptr + slot, distance, mask=exists)
        loss += tl.where(exists, weight * distance, 0.0)
    tl.store(loss_ptr, tl.sum(loss, axis=0))


@triton.jit
def mask_kernel(
    table_ptr,  # int64 [K, WIDTH]: the layers
    mask_ptr,  # uint8 [sum of positions over distinct indices]: out, 1 where selected; zeros before
    BLOCK_N: tl.constexpr,
):
    """Turns the indices into masks, so that backward can write every element of a gradient once."""
    row = table_ptr + tl.program_id(1) * _WIDTH
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = n < tl.where(tl.load(row + _OWNS_MASK) != 0, tl.load(row + _SELECTED), 0)
    position = tl.load(tl.load(row + _INDEX).to(tl.pointer_type(tl.int64)) + n, mask=valid, other=0)
    valid = valid & (position >= 0) & (position < tl.load(row + _POSITIONS))
    tl.store(mask_ptr + tl.load(row + _MASK) + position, 1, mask=valid)


@triton.jit
def backward_kernel(
    table_ptr,  # int64 [K, WIDTH]: the layers
    upstream_ptr,  # float []: gradient of the loss
    weights_ptr,  # float32 [K]: w_l, unless they are in the table
    mask_ptr,  # uint8: token masks, see mask_kernel
    to_perturbed_ptr,  # dtype of h': out, the gradients of the h' at their offsets, each [positions, H_l] contiguous
    to_clean_ptr,  # dtype of h: out, the same for h
    first,
    share,
    CLEAN: tl.constexpr,
    PERTURBED: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    OVERWRITE: tl.constexpr,  # h holds the difference and becomes the gradient of h'
    GRAD_PERTURBED: tl.constexpr,
    GRAD_CLEAN: tl.constexpr,
    FLAT: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGN: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """2 w_l scale_l upstream (h' - h) where selected, zero elsewhere; each element is written once."""
    layer = first + tl.program_id(1)
    row = table_ptr + layer * _WIDTH
    clean = tl.multiple_of(tl.load(row + _CLEAN).to(tl.pointer_type(CLEAN)), ALIGN)
    perturbed = tl.multiple_of(tl.load(row + _PERTURBED).to(tl.pointer_type(PERTURBED)), ALIGN)
    hidden = tl.multiple_of(tl.load(row + _HIDDEN), VEC)
    positions = tl.load(row + _POSITIONS)
    offset = tl.multiple_of(tl.load(row + _OFFSET), VEC)
    weight = _as_float(tl.load(row + _WEIGHT))
    if HAS_WEIGHTS:
        weight = tl.load(weights_ptr + tl.load(row + _SLOT))
    factor = tl.load(upstream_ptr).to(tl.float32) * weight * (2.0 * _as_float(tl.load(row + _SCALE)))
    across = tl.cdiv(hidden, BLOCK_H)
    begin = tl.program_id(0).to(tl.int64) * share
    end = tl.minimum(begin + share, tl.cdiv(positions, BLOCK_N) * across)

    for tile in range(begin, end):
        position = (tile // across) * BLOCK_N + tl.arange(0, BLOCK_N)
        columns = (tile % across).to(tl.int32) * BLOCK_H + tl.arange(0, BLOCK_H)
        exists = position < positions
        written = exists[:, None] & (columns < hidden)[None, :]
        read = written
        if HAS_INDEX:
            mask = tl.load(row + _MASK)
            masked = position < tl.where(mask >= 0, positions, 0)
            kept = tl.load(mask_ptr + mask + position, mask=masked, other=1)
            read = written & (kept != 0)[:, None]
        h_at = _tile_pointers(clean, row + _CLEAN_STRIDES, position, columns, FLAT, UNIT, VEC)
        if OVERWRITE:
            difference = tl.load(h_at, mask=read, other=0.0).to(tl.float32)
        else:
            h_prime_at = _tile_pointers(perturbed, row + _PERTURBED_STRIDES, position, columns, FLAT, UNIT, VEC)
            h = tl.load(h_at, mask=read, other=0.0).to(tl.float32)
            difference = tl.load(h_prime_at, mask=read, other=0.0).to(tl.float32) - h
        gradient = difference * factor
        if HAS_INDEX:
            # An infinite factor must not turn unselected zeros into NaN.
            gradient = tl.where(read, gradient, 0.0)
        if OVERWRITE:
            tl.store(h_at, gradient.to(CLEAN), mask=written)
        else:
            at = offset + position[:, None] * hidden + columns[None, :]
            if GRAD_PERTURBED:
                tl.store(to_perturbed_ptr + at, gradient.to(PERTURBED), mask=written)
            if GRAD_CLEAN:
                tl.store(to_clean_ptr + at, (-gradient).to(CLEAN), mask=written)
