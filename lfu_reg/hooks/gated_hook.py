"""What is registered on the user's modules: hooks that are silent until their owner listens."""

from __future__ import annotations

import functools
from typing import Any, Protocol

import torch

from lfu_reg.model.compile import region


class Listener(Protocol):
    """Whom hooks belong to."""

    # All that is traced of a hook is a look at this flag, so a compiled model has its graphs twice at most: with silent
    # hooks, and broken at each of them.
    listening: bool

    def on_call(self, name: str, compiled: bool, *call: Any) -> Any:
        """What the hook on module `name` does with what torch gives it; `compiled`: in a region of torch.compile."""


class Hook:
    """What is registered on a module: hands every call on, with the module's name first; copies of it do nothing."""

    def __init__(self, listener: Listener | None, name: str) -> None:
        self.listener = listener
        self.name = name
        self._hand_on = hand_on() if listener is not None else None

    def __call__(self, *call: Any) -> Any:
        """Pass the call on. Kept this short as torch.compile traces it: looking at the name would tell layers apart."""
        listener = self.listener
        if listener is None or not listener.listening:
            return None
        return self._hand_on(self, call)  # type: ignore[misc]

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, (None, self.name)


@functools.cache
def hand_on() -> Any:
    """How hooks hand calls on, unseen by torch.compile. Made at the first hook: the decorators import the compiler."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def call_listener(hook: Hook, compiled: bool, call: tuple[Any, ...]) -> Any:
        assert hook.listener is not None
        return hook.listener.on_call(hook.name, compiled, *call)

    @functools.partial(torch.compiler.disable, recursive=False)
    def hand_on(hook: Hook, call: tuple[Any, ...]) -> Any:
        # Inside of a function that is untraced altogether the region is not to be seen any more.
        return call_listener(hook, region() not in (None, False), call)

    return hand_on
