"""Sizes of tiles and launches, and the address arithmetic, of the Triton kernels."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from math import prod

# Elements per tile, powers of two: 32 per thread at 4 warps where 16-byte accesses fit. Where they do not, every
# element needs an address of its own, and more than 8 per thread would spill registers.
TILE = 4096
TILE_MIXED = 2048  # two dtypes need a conversion between their layouts
TILE_UNALIGNED = 1024
TILE_STRIDED = 512
WARPS = 4
# Tiles per program at least: forward saves partial sums by more, backward has none.
SHARE_FORWARD = 4
SHARE_BACKWARD = 2
# Partial sums are kept to this many in all (256 KiB) by giving programs more tiles.
MAX_PARTIALS = 1 << 16
# Below this many hidden units a row of a tile would be shorter than a few memory transactions.
_MIN_BLOCK_H = 128


def collapse(shape: Sequence[int], stride: Sequence[int]) -> tuple[int, int, int, int] | None:
    """Address arithmetic for [..., hidden]: inner size and outer, inner and hidden stride.

    Position p is at (p // inner) * outer + (p % inner) * inner stride. None if the leading dimensions do not merge
    into two.
    """
    sizes: list[int] = []
    steps: list[int] = []
    for size, step in zip(shape[:-1], stride[:-1], strict=True):
        if size == 1:
            continue
        if steps and steps[-1] == size * step:
            sizes[-1] *= size
            steps[-1] = step
        else:
            sizes.append(size)
            steps.append(step)
    if len(sizes) > 2:
        return None
    # A single leading dimension is all inner.
    inner, outer_step, inner_step = max(1, prod(shape[:-1])), 0, 0
    if len(sizes) == 2:
        inner, outer_step, inner_step = max(1, sizes[1]), steps[0], steps[1]
    elif sizes:
        inner_step = steps[0]
    return inner, outer_step, inner_step, stride[-1] if shape[-1] > 1 else 1


def share_of(tiles: int, count: int, least: int) -> tuple[int, int]:
    """Tiles per program and programs per layer, so that all programs together stay below `MAX_PARTIALS`."""
    share = max(least, -(-tiles * count // MAX_PARTIALS))
    return share, max(1, -(-tiles // share))


def block_width(hidden: int, tile: int) -> int:
    """The power of two up to `tile` that covers `hidden` units with the fewest lanes idle; of several the largest."""
    candidates = [1 << power for power in range(tile.bit_length())]
    fitting = [b for b in candidates if b >= min(_MIN_BLOCK_H, hidden)]
    return min(fitting, key=lambda b: (-(-hidden // b) * b, -b))


def float_bits(number: float) -> int:
    """The bits of the nearest float32, as an int."""
    try:
        return int(struct.unpack("<i", struct.pack("<f", number))[0])
    except OverflowError:
        return float_bits(math.copysign(math.inf, number))
