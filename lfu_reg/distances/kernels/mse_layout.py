"""The columns of the table of layers that kernels read, sizes of tiles and launches, and the address arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import prod
from operator import mul

# The columns of the table, one row per layer.
FIELDS = (
    "clean",  # address of h
    "perturbed",  # address of h'
    "slot",  # where the layer's distance goes in the output
    "offset",  # of the layer's gradient in the gradient buffer, in elements
    "weight",  # bits of the float32 w_l; unused when weights come as a tensor
    "owns_mask",  # 1 for the one layer that fills its token mask
    "mask",  # offset of the layer's token mask in the mask buffer, -1 for all
    "scale",  # bits of the float32 1/(N_l H_l) or 1/N_l
    "hidden",  # H_l
    "positions",  # number of positions in the tensors
    "selected",  # N_l
    "index",  # address of the int64 selected positions, 0 for all
    "clean_inner",  # position -> (position // inner, position % inner), for up to two leading dimensions
    "clean_outer_stride",
    "clean_inner_stride",
    "clean_hidden_stride",
    "perturbed_inner",
    "perturbed_outer_stride",
    "perturbed_inner_stride",
    "perturbed_hidden_stride",
)
WIDTH = len(FIELDS)

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


def contiguous_strides(shape: Sequence[int]) -> list[int]:
    """The strides of a contiguous tensor of that shape."""
    return list(accumulate(reversed(shape[1:]), mul, initial=1))[::-1]


def share_of(tiles: int, count: int, least: int) -> tuple[int, int]:
    """Tiles per program and programs per layer, so that all programs together stay below `MAX_PARTIALS`."""
    share = max(least, -(-tiles * count // MAX_PARTIALS))
    return share, max(1, -(-tiles // share))


def block_width(hidden: int, tile: int) -> int:
    """The power of two up to `tile` that covers `hidden` units with the fewest lanes idle; of several the largest."""
    candidates = [1 << power for power in range(tile.bit_length())]
    fitting = [b for b in candidates if b >= min(_MIN_BLOCK_H, hidden)]
    return min(fitting, key=lambda b: (-(-hidden // b) * b, -b))
