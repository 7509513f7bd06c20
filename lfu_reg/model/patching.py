"""Parameters and forward methods replaced by others for a while, without ever being written to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch import nn

# A module, the name of its parameter, and the tensor to use instead, which may carry a graph; or a module, "forward",
# and what to call instead of its forward method.
Patch: TypeAlias = tuple[nn.Module, str, Any]

ABSENT: Any = object()


@contextmanager
def patched(replacements: Iterable[Patch]) -> Iterator[None]:
    """Let modules see and run what stands in the place of their own for the block, also if an exception ends it."""
    listed = [(vars(m) if name == "forward" else m._parameters, name, new) for m, name, new in replacements]
    kept = [(table, name, table.get(name, ABSENT)) for table, name, _ in listed]
    try:
        for table, name, new in listed:
            table[name] = new
        yield
    finally:
        for table, name, old in kept:
            if old is ABSENT:
                table.pop(name, None)
            else:
                table[name] = old
