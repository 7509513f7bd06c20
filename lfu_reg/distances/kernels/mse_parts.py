"""One layer of the torch twin, in parts that fit into the cache: which positions, their squared sum, their gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

# Elements per part: two float32 scratch buffers of this size are 4 MiB (measured: smaller ones pay for the calls).
_PART_CPU = 1 << 19
# Elsewhere there is no cache to stay in; the parts only bound the temporaries.
_PART_OTHER = 1 << 24
# Runs of neighbouring positions at least this long, in elements, are read in place instead of gathered (measured).
_LONG_RUN = 1 << 15
# Up to this many squares are added in one go, longer sums in rows of the second number.
_LONG_SUM, _ROW = 1 << 15, 1 << 11

# Backward multiplies by a number on the CPU and by a scalar tensor elsewhere, where reading it would synchronise.
Factor: TypeAlias = float | Tensor


@dataclass(frozen=True, slots=True)
class Selection:
    """The positions of a layer that count, in one of two forms.

    Attributes:
        sizes: lengths of the ranges that the positions 0 .. positions-1 are cut into, or None: see `chunks`.
        kept: whether each of the ranges counts.
        chunks: int64 tensors of the positions that count, where there are no ranges.
        whole: whether everything counts and is one part.
    """

    sizes: list[int] | None
    kept: list[bool]
    chunks: Sequence[Tensor] = ()
    whole: bool = False


class Scratch:
    """Buffers that are allocated at most once per call and then stay in the cache."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, int], Tensor] = {}
        self._last: Tensor | None = None

    def get(self, slot: str, rows: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Uninitialised [rows, like.shape[1]]; a slot's contents are lost at its next use."""
        hidden = like.shape[1]
        buffer = self._buffers.get((slot, dtype, hidden))
        if buffer is None or len(buffer) < rows:
            buffer = self._buffers[slot, dtype, hidden] = like.new_empty(rows, hidden, dtype=dtype)
        return buffer if len(buffer) == rows else buffer[:rows]

    def like(self, tensor: Tensor) -> Tensor:
        """An uninitialised contiguous tensor of that shape and dtype, always the same one."""
        if self._last is None or self._last.shape != tensor.shape or self._last.dtype != tensor.dtype:
            self._last = tensor.new_empty(tensor.shape)
        return self._last


class Layer:
    """One layer by itself; see `mse_torch.Entry`.

    Args:
        layers: its number in the problem, as a range.
        clean: [..., hidden].
        perturbed: the same shape.
        selection: the positions that count.
        overwrite: whether h' - h may be written over `clean`.
    """

    def __init__(self, layers: range, clean: Tensor, perturbed: Tensor, selection: Selection, overwrite: bool) -> None:
        self.layers = layers
        self.clean: Tensor | None = clean
        self.perturbed: Tensor | None = perturbed
        self.selection = selection
        self.overwrite = overwrite

    def forward(self, scratch: Scratch) -> tuple[list[float | Tensor], tuple[Tensor, Tensor | None]]:
        """Its squared sum, and references to its tensors."""
        h, h_prime = self.clean, self.perturbed
        assert h is not None
        assert h_prime is not None
        self.clean = self.perturbed = None
        total = squared_sum(h, h_prime, self.selection, self.overwrite, scratch)
        # Where the difference took the place of h, nothing of h' is needed any more.
        return [total], (h, None if self.overwrite else h_prime)

    def backward(
        self, saved: Sequence[Tensor], factors: Sequence[Factor], wanted: tuple[bool, bool], scratch: Scratch
    ) -> tuple[Tensor | None, Tensor | None]:
        """The scaled difference and its negative."""
        h, h_prime = saved
        (factor,) = factors
        if self.overwrite:
            return finish(h, self.selection, factor), None
        positive = gradient(h_prime, h, self.selection, factor, scratch) if wanted[0] else None
        if not wanted[1]:
            return positive, None
        if positive is not None and positive.dtype == h.dtype:
            return positive, positive.neg()
        return positive, gradient(h, h_prime, self.selection, factor, scratch)


def select(states: Tensor, index: Tensor | None) -> Selection:
    """Cut the positions of a layer [..., hidden] into parts.

    Positions mostly come in runs (the response after the prompt). On the CPU, where looking at them costs nothing,
    long runs become ranges.

    Raises:
        IndexError: on the CPU, if `index` was looked at and points outside of the layer.
    """
    hidden = max(1, states.shape[-1])
    positions = states.numel() // hidden
    on_cpu = states.device.type == "cpu"
    step = max(1, (_PART_CPU if on_cpu else _PART_OTHER) // hidden)
    if index is None:
        return _ranges([(0, positions)] if positions else [], positions, step)
    if len(index) == 0:
        return _ranges([], positions, step)
    if on_cpu and len(index) * hidden >= _LONG_RUN:
        runs = _runs(index, _LONG_RUN // hidden, positions)
        if runs is not None:
            return _ranges(runs, positions, step)
    return Selection(None, [], torch.split(index, step))


def squared_sum(h: Tensor, h_prime: Tensor, selection: Selection, overwrite: bool, scratch: Scratch) -> float | Tensor:
    """Sum of (h' - h)^2 over the selected positions, accumulated in float32 or wider.

    Args:
        h: [..., hidden]; with `overwrite`, h' - h takes its place at the selected positions, which must be ranges.
        h_prime: the same shape.
        selection: what counts.
        overwrite: see above.
        scratch: buffers to work in.

    Returns:
        A number on the CPU, where Python adds the parts in double precision; elsewhere a scalar tensor.
    """
    wide = wider(h, h_prime)
    same = h.dtype == h_prime.dtype == wide
    on_cpu = h.device.type == "cpu"
    if selection.whole and same and not overwrite:
        # The common case of a small model: here the calls around the arithmetic are what costs.
        value = _sum_of_squares(torch.sub(h_prime, h, out=scratch.like(h_prime)))
        return value.item() if on_cpu else value
    h_rows, h_prime_rows = _rows(h), _rows(h_prime)
    total: float | Tensor = 0.0
    for a, b in _walk(selection, h_prime_rows, h_rows, scratch):
        if overwrite:
            difference = torch.sub(a, b, out=b)
            if not same:
                difference = scratch.get("wide", len(a), a, wide).copy_(difference)
        elif same:
            difference = torch.sub(a, b, out=scratch.get("a", len(a), a, wide))
        else:
            # Widened before the subtraction, as in the kernel: half precision may not hold the difference.
            difference = scratch.get("wide", len(a), a, wide).copy_(a)
            difference.sub_(b if b.dtype == wide else scratch.get("wide b", len(a), a, wide).copy_(b))
        value = _sum_of_squares(difference)
        total = total + (value.item() if on_cpu else value)
    return total


def gradient(plus: Tensor, minus: Tensor, selection: Selection, factor: Factor, scratch: Scratch) -> Tensor:
    """The gradient for `plus`: factor * (plus - minus), zero at positions that were not selected."""
    if selection.whole and isinstance(factor, float) and plus.dtype == minus.dtype:
        return torch.sub(plus, minus).mul_(factor)
    a_rows, b_rows = _rows(plus), _rows(minus)
    if selection.sizes is None:
        result = a_rows.new_zeros(a_rows.shape)
        for chunk, a, b in _gather(selection, a_rows, b_rows, scratch):
            if isinstance(factor, float):
                result.index_add_(0, chunk, torch.sub(a, b, out=a), alpha=factor)
            else:
                result.index_copy_(0, chunk, _scaled_difference(a, b, factor, a))
        return result.view(plus.shape)
    result = a_rows.new_empty(a_rows.shape)
    ranges = (_split(rows, selection.sizes) for rows in (result, a_rows, b_rows))
    for kept, out, a, b in zip(selection.kept, *ranges, strict=True):
        if kept:
            _scaled_difference(a, b, factor, out)
        else:
            out.zero_()
    return result.view(plus.shape)


def finish(difference: Tensor, selection: Selection, factor: Factor) -> Tensor:
    """Turn the difference that `squared_sum` left in the clean tensor into the gradient, in place."""
    assert selection.sizes is not None
    rows = _rows(difference.detach())
    for kept, part in zip(selection.kept, _split(rows, selection.sizes), strict=True):
        if kept:
            _scale(part, factor)
        else:
            part.zero_()
    return rows.view(difference.shape)


def wider(a: Tensor, b: Tensor) -> torch.dtype:
    """The dtype that sums are accumulated in: float32, or float64 if one of the two is."""
    return torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32


def _sum_of_squares(values: Tensor) -> Tensor:
    """In one pass and without a temporary; long vectors in pieces, as one running sum would lose digits (measured)."""
    flat = values.view(-1)
    if flat.numel() <= _LONG_SUM:
        return torch.dot(flat, flat)
    if flat.numel() % _ROW == 0:
        norms = torch.linalg.vector_norm(flat.view(-1, _ROW), dim=1)
        return torch.dot(norms, norms)
    return torch.stack([torch.dot(piece, piece) for piece in torch.split(flat, _LONG_SUM)]).sum()


def _rows(states: Tensor) -> Tensor:
    """[..., hidden] as [positions, hidden]; a copy only where the strides of the leading dimensions demand one."""
    if states.dim() == 2:
        return states
    return states.reshape(states.numel() // max(1, states.shape[-1]), states.shape[-1])


def _gather(
    selection: Selection, a_rows: Tensor, b_rows: Tensor, scratch: Scratch
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(positions, a, b) for each chunk, with copies of the rows."""
    for chunk in selection.chunks:
        a = torch.index_select(a_rows, 0, chunk, out=scratch.get("a", len(chunk), a_rows, a_rows.dtype))
        b = torch.index_select(b_rows, 0, chunk, out=scratch.get("b", len(chunk), b_rows, b_rows.dtype))
        yield chunk, a, b


def _walk(selection: Selection, a_rows: Tensor, b_rows: Tensor, scratch: Scratch) -> Iterator[tuple[Tensor, Tensor]]:
    """(a, b) for each part that counts: views where the parts are ranges, copies otherwise."""
    if selection.sizes is None:
        yield from ((a, b) for _, a, b in _gather(selection, a_rows, b_rows, scratch))
        return
    ranges = zip(selection.kept, _split(a_rows, selection.sizes), _split(b_rows, selection.sizes), strict=True)
    yield from ((a, b) for kept, a, b in ranges if kept)


def _split(rows: Tensor, sizes: list[int]) -> Sequence[Tensor]:
    return (rows,) if len(sizes) == 1 else torch.split(rows, sizes)


def _scaled_difference(a: Tensor, b: Tensor, factor: Factor, out: Tensor) -> Tensor:
    if isinstance(factor, float):
        return torch.sub(a, b, out=out).mul_(factor)
    # A scalar tensor would be rounded to the dtype of `out` before it multiplies, and may vanish in it.
    return out.copy_(a.to(factor.dtype).sub(b).mul_(factor))


def _scale(rows: Tensor, factor: Factor) -> None:
    if isinstance(factor, float):
        rows.mul_(factor)
    else:
        rows.copy_(rows.to(factor.dtype).mul_(factor))


def _ranges(runs: list[tuple[int, int]], positions: int, step: int) -> Selection:
    """The positions cut at the ends of the runs; runs are cut into steps as well."""
    sizes: list[int] = []
    kept: list[bool] = []
    at = 0
    for start, stop in [*runs, (positions, positions)]:
        if start > at:
            sizes.append(start - at)
            kept.append(False)
        for begin in range(start, stop, step):
            sizes.append(min(stop, begin + step) - begin)
            kept.append(True)
        at = stop
    return Selection(sizes or [0], kept or [False], whole=kept == [True])


def _runs(index: Tensor, shortest: int, positions: int) -> list[tuple[int, int]] | None:
    """(start, stop) of each run of neighbours in `index`; None if it is unsorted or they are short on average."""
    breaks = (index[1:] - index[:-1] != 1).nonzero().view(-1)
    if len(index) < shortest * (len(breaks) + 1):
        return None
    starts = index[torch.cat((breaks.new_zeros(1), breaks + 1))].tolist()
    stops = index[torch.cat((breaks, breaks.new_full((1,), len(index) - 1)))].tolist()
    runs = [(start, last + 1) for start, last in zip(starts, stops, strict=True)]
    if any(before[1] > after[0] for before, after in pairwise(runs)):
        return None
    if runs[0][0] < 0 or runs[-1][1] > positions:
        raise IndexError(
            f"token_index reaches from {runs[0][0]} to {runs[-1][1] - 1}; the layer has positions 0 to {positions - 1}."
        )
    return runs
