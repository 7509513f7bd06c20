"""Weights moved in place for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor


@contextmanager
def moved_in_place(
    tensors: Sequence[Tensor],
    deltas: Sequence[Tensor],
    changed: Callable[[], None] = lambda: None,
    *,
    stay_saved: bool = False,
) -> Iterator[None]:
    """Tensors moved by deltas for the block, and put back to the last bit whatever happens; `changed` both times.

    With `stay_saved` graphs of the block keep the moved values, for a backward that comes after it.
    """
    kept = [tensor.clone() for tensor in tensors]
    try:
        for tensor, delta in zip(tensors, deltas, strict=True):
            tensor.add_(delta)
        changed()
        torch.clear_autocast_cache()  # which knows weights by identity
        with _copies_saved(tensors) if stay_saved else nullcontext():
            yield
    finally:
        for tensor, before in zip(tensors, kept, strict=True):
            tensor.copy_(before)
        changed()
        torch.clear_autocast_cache()


def _copies_saved(tensors: Sequence[Tensor]) -> AbstractContextManager[Any]:
    """Context in which graphs save copies of what shares memory with the tensors, and of what might."""
    memory = {tensor.untyped_storage().data_ptr() for tensor in tensors if _is_plain(tensor)}

    def pack(saved: Tensor) -> Tensor:
        stays = _is_plain(saved) and saved.untyped_storage().data_ptr() not in memory
        # `saved` is a view of a tensor of the graph, which would keep that alive.
        return saved.data if stays else saved.clone()

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed)


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and tensor.layout is torch.strided
