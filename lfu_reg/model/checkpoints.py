"""Notices activation checkpoints, which a retained graph cannot have, and other uses of saved-tensor hooks.

A checkpointed block runs its forward again during the backward pass. The released strategy takes its gradients while
the pass is still set up, so the block repeats exactly what it did. A retained graph is backpropagated by the caller,
when the perturbation is gone: the block would run again without it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
import torch.utils.checkpoint
from torch import Tensor

REFUSED = (
    "{} does not go with a graph that is retained until the caller's backward, as checkpointed blocks would run again "
    "without the perturbation, and what is written to stay so. The graph is retained with strategy='retained', "
    "stop_gradient='none' or 'perturbed', FSDP1 and ZeRO-3, and where the loss depends on a graph that was made before "
    "the call (a batch that comes out of another trained network: compute it inside of sft_loss_fn). Use the defaults, "
    "or switch it off."
)

OFFLOADED = (
    "Somebody's saved-tensor hooks are in force (activation offloading). They expect one backward after each forward, "
    "and a graph that is retained is gone through more than once. Use strategy='released' with stop_gradient='clean' "
    "(the defaults), or switch offloading off."
)

Listener: TypeAlias = Callable[[str, Any], None]  # gets what happens, and to what

# Private, and not in torch 2.6: there is no telling who saves activations.
_innermost_hooks: Callable[[bool], Any] | None = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)

_changing = threading.Lock()
_listeners: dict[int, tuple[int, Listener]] = {}  # with their threads
_replaced: list[tuple[Any, str, Any]] = []  # what stands behind the watch


def can_tell_who_saves() -> bool:
    """Whether `saves_elsewhere` works with this version of torch."""
    return _innermost_hooks is not None


def saves_elsewhere() -> bool:
    """Whether saved tensors go through hooks of somebody else than torch itself."""
    top = None if _innermost_hooks is None else _innermost_hooks(False)
    return top is not None and not getattr(top[0], "__module__", "").startswith(("torch.", "lfu_reg."))


def repeats_stop_early() -> bool:
    """Whether a region that runs again stops once it has what the backward needs."""
    return bool(getattr(torch.utils.checkpoint, "_enable_checkpoint_early_stop", True))


@contextmanager
def noted() -> Iterator[list[str]]:
    """What this thread does in the block: enter a "checkpoint", perhaps a "selective" one, put a "hook" on a tensor."""
    found: list[str] = []

    def note(what: str, subject: Any) -> None:
        if what != "hooks":
            found.append(what)
        elif type(subject).__module__ == torch.utils.checkpoint.__name__:
            found.append("checkpoint")

    with _told(note):
        yield found


@contextmanager
def packed_before(pack: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """What graphs of this thread save in the block goes through `pack`, before it goes through anybody's hooks."""

    def compose(what: str, subject: Any) -> None:
        if what == "hooks":
            theirs = subject.pack_hook
            subject.pack_hook = lambda tensor: theirs(pack(tensor))

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed), _told(compose):
        yield


@contextmanager
def _told(tell: Listener) -> Iterator[None]:
    with _changing:
        if not _listeners:
            _watch()
        _listeners[id(tell)] = threading.get_ident(), tell
    try:
        yield
    finally:
        with _changing:
            del _listeners[id(tell)]
            if not _listeners:
                for owner, name, own in _replaced:
                    setattr(owner, name, own)
                _replaced.clear()


def _watch() -> None:
    """Look at every use of saved-tensor hooks, without which there is no checkpoint, and of tensor hooks."""
    checkpoints: Any = torch.utils.checkpoint
    for owner, name, what in (
        (torch.autograd.graph.saved_tensors_hooks, "__enter__", "hooks"),
        (checkpoints._CachingTorchDispatchMode, "__init__", "selective"),  # what it keeps serves one backward
        (torch.Tensor, "register_hook", "hook"),
    ):
        own = getattr(owner, name)
        _replaced.append((owner, name, own))
        setattr(owner, name, _telling(own, what))


def _telling(own: Any, what: str) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        for thread, tell in list(_listeners.values()):
            if thread == threading.get_ident():
                tell(what, self)
        return own(self, *args, **kwargs)

    return call
