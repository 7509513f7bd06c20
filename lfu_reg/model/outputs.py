"""The hidden state inside whatever a layer returns: tensor, tuple, list, dict, ModelOutput, dataclass.

A hook must change exactly one tensor and hand back an object of the same type. `locate` finds the way to that
tensor as a path of keys, `get` follows it and `replace` rebuilds the containers along it; nothing is written in place.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

Path: TypeAlias = tuple[Any, ...]

# In a mapping these keys come first: other tensors in it (router logits, attention maps) are side results.
HIDDEN_STATE = ("last_hidden_state", "hidden_states", "hidden_state", "output")
LOGITS = ("logits",)


def locate(output: Any, preferred: tuple[str, ...] = HIDDEN_STATE) -> Path | None:
    """Path to the first floating-point tensor with dimensions in `output`, or None when there is none.

    Args:
        output: what a module returned.
        preferred: keys that come first in a mapping, where they hold a tensor.
    """
    if isinstance(output, Tensor):
        return () if output.is_floating_point() and output.dim() else None
    for key, value in _entries(output, preferred):
        path = locate(value, preferred)
        if path is not None:
            return (key, *path)
    return None


def get(output: Any, path: Path) -> Tensor:
    """The tensor at `path`."""
    for key in path:
        output = getattr(output, key.name) if isinstance(key, _Field) else output[key]
    assert isinstance(output, Tensor)
    return output


def replace(output: Any, path: Path, tensor: Tensor) -> Any:
    """A shallow copy of `output` with `tensor` at `path`; every other entry is the same object as before."""
    if not path:
        return tensor
    key, rest = path[0], path[1:]
    if isinstance(key, _Field):
        return dataclasses.replace(output, **{key.name: replace(getattr(output, key.name), rest, tensor)})
    entry = replace(output[key], rest, tensor)
    if isinstance(output, tuple):
        items = [*output[:key], entry, *output[key + 1 :]]
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    changed = copy.copy(output)
    changed[key] = entry
    return changed


def describe(output: Any) -> str:
    """Short description of an output for error messages."""
    if isinstance(output, Tensor):
        return f"a {output.dtype} tensor of shape {list(output.shape)}"
    return "None" if output is None else f"a {type(output).__name__}"


def is_cache(value: Any) -> bool:
    """Whether `value` is a key/value cache, which grows when it is used."""
    return type(value).__name__.endswith("Cache")


@dataclasses.dataclass(frozen=True)
class _Field:
    """A dataclass attribute, as opposed to an index or a key."""

    name: str


def _entries(output: Any, preferred: tuple[str, ...]) -> list[tuple[Any, Any]]:
    if isinstance(output, Mapping):
        first = [key for key in preferred if isinstance(output.get(key), Tensor)]
        return [(key, output[key]) for key in [*first, *(k for k in output if k not in first)]]
    if isinstance(output, (tuple, list)) and not isinstance(output, torch.Size):
        return list(enumerate(output))
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return [(_Field(f.name), getattr(output, f.name)) for f in dataclasses.fields(output)]
    return []
