"""Activation checkpoints in a retained graph are refused.

A checkpointed block runs its forward again during the backward pass. The released strategy takes its gradients while
the pass is still set up, so the block repeats exactly what it did. A retained graph is backpropagated by the caller,
when the perturbation is gone: the block would run again without it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint

REFUSED = (
    "Activation checkpointing does not go with a graph that is retained until the caller's backward: checkpointed blocks "
    "would run again without the perturbation. {cure}"
)
BY_STRATEGY = (
    "Use strategy='released' with stop_gradient='clean' (the defaults, without sharding by FSDP1 or ZeRO-3), or switch "
    "checkpointing off."
)

_changing = threading.Lock()
_refusing: set[int] = set()  # threads
_entered: list[Any] = []  # what stands behind the watch


@contextmanager
def refused() -> Iterator[None]:
    """Raise RuntimeError if this thread enters a non-reentrant checkpoint in the block."""
    thread = threading.get_ident()
    with _changing:
        nested = thread in _refusing
        if not _refusing:
            _watch()
        _refusing.add(thread)
    try:
        yield
    finally:
        with _changing:
            if not nested:
                _refusing.discard(thread)
            if not _refusing:
                torch.autograd.graph.saved_tensors_hooks.__enter__ = _entered.pop()  # type: ignore[method-assign]


def _watch() -> None:
    """Look at every use of saved-tensor hooks: it is public, and there is no checkpoint without it."""
    hooks = torch.autograd.graph.saved_tensors_hooks
    enter = hooks.__enter__

    def watched(self: Any) -> None:
        if threading.get_ident() in _refusing and type(self).__module__ == torch.utils.checkpoint.__name__:
            raise RuntimeError(REFUSED.format(cure=BY_STRATEGY))
        enter(self)

    _entered.append(enter)
    hooks.__enter__ = watched  # type: ignore[method-assign]
