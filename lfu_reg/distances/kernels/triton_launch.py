"""Launches of the Triton kernels: one forward, one backward. Imports triton, so it is imported only when needed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from lfu_reg.distances.kernels.autograd import Gradients, Implementation, States
from lfu_reg.distances.kernels.problem import Problem
from lfu_reg.distances.kernels.table import Table, build_table
from lfu_reg.distances.kernels.triton_kernels import backward_kernel, forward_kernel

_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
# Elements per tile, powers of two: 32 per thread at 4 warps where 16-byte accesses fit. Where they do not, every
# element needs an address of its own, and more than 8 per thread would spill registers.
TILE = 4096
TILE_MIXED = 2048  # two dtypes need a conversion between their layouts
TILE_UNALIGNED = 1024
WARPS = 4
# Tiles per program at least: forward saves partial sums by more, backward has none.
SHARE_FORWARD = 4
SHARE_BACKWARD = 2
# Partial sums are kept to this many in all (256 KiB) by giving programs more tiles.
MAX_PARTIALS = 1 << 16
# Below this many hidden units a row of a tile would be shorter than a few memory transactions.
_MIN_BLOCK_H = 128


def forward(problem: Problem, clean: States, perturbed: States) -> Tensor:
    """The distances d_l [K]."""
    clean, perturbed = [h.contiguous() for h in clean], [h.contiguous() for h in perturbed]
    table = build_table(problem, clean, perturbed, [False] * len(clean))
    options = launch_options(problem.dtypes, table)
    share, programs = _grid(problem, table, options, SHARE_FORWARD)
    partial = torch.empty(len(clean), programs, dtype=torch.float32, device=problem.device)
    with _on(problem.device):
        forward_kernel[(programs, len(clean))](table.values, partial, programs, share, **options)
    return partial.sum(1)


def backward(
    problem: Problem,
    clean: States,
    perturbed: States,
    upstream: Tensor,
    want_clean: Sequence[bool],
    want_perturbed: Sequence[bool],
) -> tuple[Gradients, Gradients]:
    """The gradients, as views of one buffer for each side."""
    clean, perturbed = [h.contiguous() for h in clean], [h.contiguous() for h in perturbed]
    wanted = [a or b for a, b in zip(want_clean, want_perturbed, strict=True)]
    table = build_table(problem, clean, perturbed, wanted)
    options = launch_options(problem.dtypes, table)
    share, programs = _grid(problem, table, options, SHARE_BACKWARD)
    # The kernel writes the selected positions only.
    make = torch.zeros if table.has_index else torch.empty
    buffers = [
        make(table.elements if any(wants) else 0, dtype=dtype, device=problem.device)
        for wants, dtype in zip((want_clean, want_perturbed), problem.dtypes, strict=True)
    ]
    with _on(problem.device):
        backward_kernel[(programs, len(clean))](
            table.values,
            upstream.contiguous(),
            *buffers,
            share,
            GRAD_CLEAN=any(want_clean),
            GRAD_PERTURBED=any(want_perturbed),
            **options,
        )
    sizes = [h.numel() if want else 0 for h, want in zip(clean, wanted, strict=True)]
    return _views(buffers[0], clean, sizes, want_clean), _views(buffers[1], perturbed, sizes, want_perturbed)


TRITON = Implementation(forward, backward)


def launch_options(dtypes: tuple[torch.dtype, torch.dtype], table: Table) -> dict[str, Any]:
    """The compile-time arguments that both kernels share."""
    narrow = min(dtype.itemsize for dtype in dtypes)
    tile = TILE_UNALIGNED if not table.aligned else TILE if dtypes[0] == dtypes[1] else TILE_MIXED
    block_h = block_width(max(table.hidden), tile)
    return {
        "CLEAN": _DTYPES[dtypes[0]],
        "PERTURBED": _DTYPES[dtypes[1]],
        "HAS_INDEX": table.has_index,
        "ALIGN": 16 if table.aligned else narrow,
        "VEC": 16 // narrow if table.aligned else 1,
        "BLOCK_N": tile // block_h,
        "BLOCK_H": block_h,
        "num_warps": WARPS,
    }


def block_width(hidden: int, tile: int) -> int:
    """The power of two up to `tile` that covers `hidden` units with the fewest lanes idle; of several the largest."""
    candidates = [1 << power for power in range(tile.bit_length())]
    fitting = [b for b in candidates if b >= min(_MIN_BLOCK_H, hidden)]
    return min(fitting, key=lambda b: (-(-hidden // b) * b, -b))


def _grid(problem: Problem, table: Table, options: dict[str, Any], least: int) -> tuple[int, int]:
    """Tiles per program and programs per layer, so that all programs together stay below `MAX_PARTIALS`."""
    block_n, block_h = options["BLOCK_N"], options["BLOCK_H"]
    sizes = zip(problem.selected, table.hidden, strict=True)
    tiles = max(-(-selected // block_n) * -(-hidden // block_h) for selected, hidden in sizes)
    share = max(least, -(-tiles * len(table.hidden) // MAX_PARTIALS))
    return share, max(1, -(-tiles // share))


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _views(buffer: Tensor, tensors: States, sizes: list[int], wanted: Sequence[bool]) -> Gradients:
    """The wanted parts of a buffer in the shapes of their tensors."""
    if not any(wanted):
        return [None] * len(tensors)
    parts = zip(torch.split(buffer, sizes), tensors, wanted, strict=True)
    return [part.view(tensor.shape) if want else None for part, tensor, want in parts]
