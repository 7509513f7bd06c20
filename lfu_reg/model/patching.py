"""Entries of dictionaries replaced for a while: attributes, forward methods and buffers of modules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeAlias

from torch import nn
from torch.nn.utils import parametrize

# A dictionary, a key, and what to keep there.
Patch: TypeAlias = tuple[dict[Any, Any], Any, Any]

ABSENT: Any = object()
# Attributes that every module has, which are no notes of its own.
EVERYBODYS = frozenset(vars(nn.Module()))


@contextmanager
def patched(replacements: Iterable[Patch]) -> Iterator[None]:
    """Let something stand in the place of entries for the block, also if an exception ends it."""
    kept: list[Patch] = []
    try:
        for table, key, new in replacements:
            kept.append((table, key, table.get(key, ABSENT)))
            table[key] = new
        yield
    finally:
        for table, key, old in reversed(kept):
            if old is ABSENT:
                table.pop(key, None)
            else:
                table[key] = old


def cached_weights_kept() -> AbstractContextManager[None]:
    """What `parametrize.cached()` keeps of weights in the block is of one pass: moved weights have others."""
    return patched([(vars(parametrize), "_cache", {})])
