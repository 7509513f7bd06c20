"""Weights moved in place for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from lfu_reg.model.checkpoints import packed_before


@contextmanager
def moved_in_place(
    pairs: Sequence[tuple[Tensor, Tensor]],
    changed: Callable[[], None] = lambda: None,
    *,
    stay_saved: bool = False,
) -> Iterator[None]:
    """Tensors moved by the deltas beside them for the block, and put back to the last bit whatever happens.

    `changed` is called both times. With `stay_saved` graphs of the block keep the moved values, for a later backward.
    """
    kept = [(tensor, tensor.clone()) for tensor, _ in pairs]

    def put_back() -> None:
        for tensor, before in kept:
            tensor.copy_(before)

    try:
        for tensor, delta in pairs:
            tensor.add_(delta)
        changed()
        torch.clear_autocast_cache()  # which knows weights by identity
        with _copies_saved([tensor for tensor, _ in pairs]) if stay_saved else nullcontext():
            yield
    finally:
        try:
            put_back()
        except BaseException:  # Ctrl-C in the midst of it
            put_back()
            raise
        finally:
            changed()
            torch.clear_autocast_cache()


def memory_of(tensors: Iterable[Tensor]) -> set[int]:
    """Addresses of the memory that tensors share with their views; of DTensors that of their parts here."""
    parts = (getattr(tensor, "_local_tensor", tensor) for tensor in tensors)
    return {part.untyped_storage().data_ptr() if part.layout is torch.strided else id(part) for part in parts}


def _copies_saved(tensors: Sequence[Tensor]) -> AbstractContextManager[Any]:
    """Context in which graphs save copies of what shares memory with the tensors, and of what might."""
    memory = memory_of(tensors)

    @_disable_dynamo  # compiled models would have it traced, for every kind of tensor anew
    def pack(saved: Tensor) -> Tensor:
        plain = type(saved) is Tensor and saved.layout is torch.strided
        # `saved` is a view of a tensor of the graph, which would keep that alive.
        return saved.data if plain and saved.untyped_storage().data_ptr() not in memory else saved.clone()

    return packed_before(pack)
