"""Activation checkpoints whose graph outlives the step are repeated as they ran.

A checkpointed block runs its forward again during the backward pass. The released strategy takes its gradients while
the pass is still set up, so the block repeats exactly what it did. A retained graph is backpropagated by the caller,
perhaps in another thread, when the perturbation is gone and other graphs may be alive beside it. So the function that a
checkpoint will call again is wrapped when the checkpoint is entered: it then brings its pass along.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeAlias, TypeVar

import torch
import torch.utils.checkpoint

T = TypeVar("T")
Function: TypeAlias = Callable[..., Any]
Surroundings: TypeAlias = Callable[[], AbstractContextManager[Any]]

# What every non-reentrant checkpoint goes through, whoever calls it. Private: without it, checkpoints are refused.
_ENTRANCE = "_checkpoint_without_reentrant_generator"
# This module knows it by a name of its own, and what it makes can be repeated only once: for g, and no more for the
# caller's backward.
_ONCE = "torch.distributed._composable.checkpoint_activation"

REFUSED = (
    "Activation checkpointing does not go with this graph, which is retained until the caller's backward: checkpointed "
    "blocks would run again without the perturbation, because {reason}. Use strategy='released' with "
    "stop_gradient='clean' (the defaults), or switch checkpointing off."
)

_changing = threading.Lock()
# By thread: in what to repeat the checkpoints that are entered there.
_surroundings: dict[int, Surroundings] = {}
_entrances: dict[str, Function] = {}
# By thread: why the checkpoints that are entered there are refused; and what stands behind the watch for them.
_reasons: dict[int, str] = {}
_entered: list[Function] = []
# Repeats put tensors into modules for a while, so there is one at a time, from whatever thread; one may hold another.
_repeating = threading.RLock()


def can_be_repeated() -> bool:
    """Whether this version of torch has the entrance."""
    return callable(getattr(torch.utils.checkpoint, _ENTRANCE, None))


@contextmanager
def repeated_in(surroundings: Surroundings) -> Iterator[None]:
    """Let checkpoints that this thread enters in the block run again in `surroundings()`, at any time, in any thread.

    Args:
        surroundings: makes the context of one repeat. It lives as long as the graph, so it must not hold on to it.
    """
    with _for_this_thread(_surroundings, surroundings, _replace_entrances, _put_entrances_back):
        yield


@contextmanager
def refused(reason: str) -> Iterator[None]:
    """Raise RuntimeError if this thread enters a non-reentrant checkpoint in the block."""
    with _for_this_thread(_reasons, reason, _watch_saved_tensors, _stop_watching):
        yield


@contextmanager
def _for_this_thread(table: dict[int, T], entry: T, first: Function, last: Function) -> Iterator[None]:
    """An entry of this thread for the block; `first` is called before there is any, and `last` when none is left."""
    thread = threading.get_ident()
    with _changing:
        if not table:
            first()
        before = table.get(thread)
        table[thread] = entry
    try:
        yield
    finally:
        with _changing:
            if before is None:
                del table[thread]
            else:
                table[thread] = before
            if not table:
                last()


def _watch_saved_tensors() -> None:
    # Public, and there is no checkpoint without it; other users of saved-tensor hooks are let through.
    hooks = torch.autograd.graph.saved_tensors_hooks
    enter = hooks.__enter__

    def watched(self: Any) -> None:
        reason = _reasons.get(threading.get_ident())
        if reason is not None and type(self).__module__ == torch.utils.checkpoint.__name__:
            raise RuntimeError(REFUSED.format(reason=reason))
        enter(self)

    _entered.append(enter)
    hooks.__enter__ = watched  # type: ignore[method-assign]


def _stop_watching() -> None:
    torch.autograd.graph.saved_tensors_hooks.__enter__ = _entered.pop()  # type: ignore[method-assign]


def _replace_entrances() -> None:
    for name, enter in ((torch.utils.checkpoint.__name__, _enter), (_ONCE, _enter_once)):
        entrance = getattr(sys.modules.get(name), _ENTRANCE, None)
        if entrance is not None:
            _entrances[name] = entrance
            setattr(sys.modules[name], _ENTRANCE, functools.partial(enter, entrance))


def _put_entrances_back() -> None:
    for name, entrance in _entrances.items():
        setattr(sys.modules[name], _ENTRANCE, entrance)
    _entrances.clear()


def _enter(entrance: Function, function: Function, *args: Any, **kwargs: Any) -> Any:
    surroundings = _surroundings.get(threading.get_ident())
    # The forward itself calls the function directly: what is handed on here is called for repeats only.
    return entrance(function if surroundings is None else _repeating_in(surroundings, function), *args, **kwargs)


def _enter_once(entrance: Function, *args: Any, **kwargs: Any) -> Any:
    if threading.get_ident() in _surroundings:
        raise RuntimeError(REFUSED.format(reason=f"{_ONCE} repeats a block only once"))
    return entrance(*args, **kwargs)


def _repeating_in(surroundings: Surroundings, function: Function) -> Function:
    # Checkpoints inside of the function need nothing here: those that will be repeated were entered in the pass itself.
    def again(*args: Any, **kwargs: Any) -> Any:
        with _repeating, surroundings():
            return function(*args, **kwargs)

    return again
