"""Parameters and forward methods replaced by others for a while, without ever being written to.

Some modules keep their parameters in a private place as well, and read them there: nn.LSTM has a list `_flat_weights`.
`references_to` finds such places, so that these see what stands in for a parameter, too.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch import Tensor, nn

# A module, the name of its parameter, and the tensor to use instead, which may carry a graph; or a module, "forward",
# and what to call instead of its forward method; or a list or dictionary, an index or key, and what to keep there.
Patch: TypeAlias = tuple["nn.Module | list[Any] | dict[Any, Any]", Any, Any]

ABSENT: Any = object()
# Attributes that every module has: no notes of its own, nor references to parameters, which are replaced by name.
EVERYBODYS = frozenset(vars(nn.Module()))


@contextmanager
def patched(replacements: Iterable[Patch]) -> Iterator[None]:
    """Let modules see and run what stands in the place of their own for the block, also if an exception ends it."""
    kept: list[tuple[Any, Any, Any]] = []
    try:
        for owner, key, new in replacements:
            table: Any = owner
            if isinstance(owner, nn.Module):
                table = vars(owner) if key == "forward" else owner._parameters
            kept.append((table, key, table[key] if isinstance(table, list) or key in table else ABSENT))
            table[key] = new
        yield
    finally:
        for table, key, old in reversed(kept):
            if old is ABSENT:
                table.pop(key, None)
            else:
                table[key] = old


def references_to(replaced: Mapping[int, Tensor], module: nn.Module) -> Iterator[Patch]:
    """What to replace in a module's own attributes that hold parameters, whose stand-ins are given by `id`."""
    # The attribute itself comes along where something inside of it is replaced, as the module may rebuild its list when
    # it sees other weights.
    attributes = vars(module)
    seen: dict[int, Any] = {}
    for name, value in attributes.items():
        if name in EVERYBODYS:
            continue
        inside: list[Patch] = []
        new = _rebuilt(value, replaced, inside, seen)
        if new is not value or inside:
            yield attributes, name, new
            yield from inside


def _rebuilt(value: Any, replaced: Mapping[int, Tensor], found: list[Patch], seen: dict[int, Any]) -> Any:
    """`value`, or what it becomes: lists and dictionaries stay the same objects, and their entries join `found`."""
    if isinstance(value, Tensor):
        return replaced.get(id(value), value)
    if isinstance(value, weakref.ref):
        new = replaced.get(id(value()))
        return value if new is None else weakref.ref(new)
    if not isinstance(value, (list, tuple, dict)):
        return value
    if id(value) in seen:
        return seen[id(value)]
    seen[id(value)] = value  # also where it holds itself
    entries = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    changed = [(key, new) for key, old in entries if (new := _rebuilt(old, replaced, found, seen)) is not old]
    if isinstance(value, tuple):
        if changed:
            items: list[Any] = [dict(changed).get(i, item) for i, item in entries]
            seen[id(value)] = type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    else:
        found += [(value, key, new) for key, new in changed]
    return seen[id(value)]
