"""The hidden state inside whatever a layer returns: tensor, tuple, list, dict, ModelOutput, dataclass.

A hook must change exactly one tensor and hand back an object of the same type. `locate` finds the way to that
tensor as a path of keys, `get` follows it and `replace` rebuilds the containers that hold it. Only a container that the
layer was given is written to in place: its caller may read it there.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

Path: TypeAlias = tuple[Any, ...]

# In a mapping these keys come first: other tensors in it (router logits, attention maps) are side results.
HIDDEN_STATE = ("last_hidden_state", "hidden_states", "hidden_state", "output")
LOGITS = ("logits",)
_NO_LOGITS_KEYS = ("last_hidden_state", "hidden_states", "hidden_state", "attentions", "past_key_values")

NO_LOGITS = (
    "The model returned {}, which holds no logits, and the distance compares logits (distance='logit_kl'). Fused "
    "losses (Liger kernels, chunked cross entropy) do not make any in training: turn them off (use_liger_kernel=False, "
    "fused_linear_cross_entropy=False), or use distance='mse', which compares hidden states."
)


def locate(output: Any, preferred: tuple[str, ...] = HIDDEN_STATE) -> Path | None:
    """Path to the first floating-point tensor with dimensions, or None; `preferred` keys come first."""
    if isinstance(output, Tensor):
        return () if output.is_floating_point() and output.dim() and not output.is_nested else None
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


def locate_logits(output: Any) -> Path:
    """Path to the logits in what a model returned: the entry of that name, or the first floating-point tensor."""
    is_none = getattr(output, "logits", ...) is None or (
        isinstance(output, Mapping) and output.get("logits", ...) is None
    )
    path = None if is_none else locate(output, LOGITS)
    if path is None or (path and path[0] in _NO_LOGITS_KEYS):
        raise ValueError(NO_LOGITS.format(describe(output)))
    return path


def replace(output: Any, path: Path, tensor: Tensor, arguments: Collection[Any] = ()) -> Any:
    """`output` with `tensor` in the place of the one at `path`, in shallow copies of the containers that hold it."""
    # Layers may return it twice. Containers among the arguments are written to where the module has put the tensor into
    # them: a state that is handed from layer to layer is read by its owner, whatever they return.
    old = get(output, path)
    vars(tensor).update(vars(old))  # what a model has noted on a tensor itself
    given: set[int] = set()
    for argument in arguments:
        _collect(argument, given)
    seen: dict[int, Any] = {}
    made = _replaced(output, old, tensor, given, seen)
    if not any(argument is old for argument in arguments):  # else it was there before the module ran
        for argument in arguments:
            _replaced(argument, old, tensor, given, seen)
    return made


def _collect(value: Any, found: set[int]) -> None:
    """Add the ids of the containers in `value`, itself included."""
    if id(value) not in found and (entries := _entries(value, ())):
        found.add(id(value))
        for _, entry in entries:
            _collect(entry, found)


def _replaced(value: Any, old: Tensor, new: Tensor, given: set[int], seen: dict[int, Any]) -> Any:
    if value is old:
        return new
    if id(value) in seen:
        return seen[id(value)]
    if not (entries := _entries(value, ())):
        return value
    seen[id(value)] = value  # also where it holds itself
    changed = {key: made for key, entry in entries if (made := _replaced(entry, old, new, given, seen)) is not entry}
    if not changed:
        return value
    if isinstance(value, tuple):
        items = [changed.get(key, entry) for key, entry in entries]
        seen[id(value)] = type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return seen[id(value)]
    target = seen[id(value)] = value if id(value) in given else copy.copy(value)
    for key, made in changed.items():
        if isinstance(key, _Field):
            object.__setattr__(target, key.name, made)  # also where the dataclass is frozen
        else:
            target[key] = made
    return target


def describe(output: Any) -> str:
    """Short description of an output for error messages."""
    if isinstance(output, Tensor):
        return "a nested tensor" if output.is_nested else f"a {output.dtype} tensor of shape {list(output.shape)}"
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
        return [(_Field(f.name), getattr(output, f.name, None)) for f in dataclasses.fields(output)]
    return []
