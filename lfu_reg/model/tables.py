"""Tables that a forward may write to: containers, generators, attributes. What was in them, and how to put it back."""

from __future__ import annotations

import operator
import pickle
import random
import sys
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

CONTAINERS = (dict, list, set, deque)
NO_TABLES = (Tensor, nn.Module)  # `collect` finds them as well
DEEPEST = 5  # containers in containers
_LARGEST = 1024  # entries; larger containers and arrays are data
_MANY = 64  # entries; modules and generators are not looked for in larger containers
_FOREIGN = ("torch", "accelerate", "deepspeed", "builtins", "threading", "_thread")


def collect(value: Any, owner: nn.Module, found: dict[int, tuple[Any, nn.Module]], depth: int) -> None:
    """Note containers, arrays, generators, modules and objects' attributes, what is in them, and lists' tensors."""
    if id(value) in found or not depth or isinstance(value, (type, str, int, float)):
        return
    if isinstance(value, (*CONTAINERS, tuple)):
        if len(value) <= _LARGEST:
            if not isinstance(value, tuple):
                found[id(value)] = value, owner
            values = [v for v in value.values() if not isinstance(v, Tensor)] if isinstance(value, dict) else value
            for entry in values:
                collect(entry, owner, found, depth - 1)
    elif (isinstance(value, (Tensor, nn.Module)) and not isinstance(value, nn.Parameter)) or _access(value):
        found[id(value)] = value, owner
    elif not _is_foreign(value):
        attributes = getattr(value, "__dict__", None)
        if type(attributes) is dict:
            collect(attributes, owner, found, depth)


def _is_foreign(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] in _FOREIGN


def _access(value: Any) -> tuple[Any, ...]:
    """How to read and how to write the state of a generator, or of an array that one may count in; () for others."""
    if isinstance(value, torch.Generator):
        return value.get_state, value.set_state
    if isinstance(value, random.Random):
        return value.getstate, value.setstate
    numpy: Any = sys.modules["numpy"] if type(value).__module__.startswith("numpy") else None
    if numpy and isinstance(value, numpy.ndarray) and value.dtype.kind in "biuf" and value.size <= _LARGEST:
        return value.copy, partial(value.__setitem__, ...)
    if numpy and isinstance(value, (numpy.random.Generator, numpy.random.RandomState)):
        bits = getattr(value, "bit_generator", None) or value._bit_generator
        return partial(getattr, bits, "state"), partial(setattr, bits, "state")
    return ()


def copied(table: Any) -> Any:
    """What is in a table now."""
    if type(table) is dict:  # as most are
        return table.copy()
    kind = next((kind for kind in CONTAINERS if isinstance(table, kind)), None)
    return kind(table) if kind is not None else _access(table)[0]()


def holds(table: Any, copy: Any) -> bool:
    """Whether a table holds the same objects as a copy of it, or a generator is where it was."""
    if isinstance(table, dict):
        return len(table) == len(copy) and all(map(operator.is_, table.values(), copy.values())) and [*table] == [*copy]
    if isinstance(table, CONTAINERS):
        return bool(table == copy) if isinstance(table, set) else [*map(id, table)] == [*map(id, copy)]
    now = copied(table)
    return torch.equal(now, copy) if isinstance(now, Tensor) else pickle.dumps(now) == pickle.dumps(copy)


def put(table: Any, copy: Any) -> None:
    """Give a table the content that it had, in place: others may hold on to it."""
    if holds(table, copy):
        return
    if not isinstance(table, CONTAINERS):
        _access(table)[1](copy)
    elif type(table) is dict:
        for name in [*(table.keys() - copy.keys())]:
            del table[name]
        table.update(copy)
    else:
        table.clear()  # to have the order that it had
        (table.update if isinstance(table, (dict, set)) else table.extend)(copy)


def is_new_in(table: Any, before: Any) -> bool:
    """Whether a tensor, a container or an object is now where a mapping had another value."""
    if not isinstance(table, dict) or holds(table, before):
        return False
    new = (value for key, value in table.items() if before.get(key) is not value)
    return any(not isinstance(value, (int, float, str, type(None))) and not callable(value) for value in new)


def held_by(model: nn.Module, *values: Any) -> list[Any]:
    """Modules and generators that a loss function, its helpers and a batch name, but for wrappers of the model."""
    found: dict[int, Any] = {}
    beside: list[Any] = []
    reached = [(value, DEEPEST) for value in values]
    for value, depth in reached:
        if value is model or id(value) in found or not depth or isinstance(value, (type, str, int, float, Tensor)):
            continue
        found[id(value)] = value
        if not isinstance(value, nn.Module) or model in value.modules():
            reached += [(entry, depth - 1) for entry in _named_by(value)]
        elif issubclass(type(value), nn.Module):  # and no weakref.proxy of one
            beside.append(value)
    return beside + [v for v in found.values() if _access(v)]


def _named_by(value: Any) -> Collection[Any]:
    """What a function, a method, a container or an object refers to, but for the globals of installed libraries."""
    if isinstance(value, (*CONTAINERS, tuple)):
        return () if len(value) > _MANY else value.values() if isinstance(value, dict) else value
    if isinstance(value, partial):
        return value.func, value.args, value.keywords
    if isinstance(value, MethodType):
        return value.__self__, value.__func__
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
        codes = [] if "-packages" in value.__code__.co_filename else [value.__code__]
        for code in codes:  # and those of the functions and comprehensions in it
            codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        named = [value.__globals__.get(name) for code in codes for name in code.co_names]
        return *cells, *named, value.__defaults__, value.__kwdefaults__
    return () if _is_foreign(value) else getattr(value, "__dict__", {}).values()


def tensors_in(value: Any, depth: int = 2 * DEEPEST, around: tuple[int, ...] = ()) -> Iterator[Tensor]:
    """The tensors in nested containers, in the attributes of objects, and in containers among these."""
    inside = (*around, id(value))
    if isinstance(value, Tensor):
        yield value
    elif not depth or id(value) in around:  # it may hold itself
        return
    elif isinstance(value, (Mapping, list, tuple)):
        for entry in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(entry, depth - 1, inside)
    elif not isinstance(value, (nn.Module, type)) and not callable(value):
        for entry in attributes(value).values():
            if isinstance(entry, (Tensor, Mapping, list, tuple)):
                yield from tensors_in(entry, depth - 1, inside)


def attributes(value: Any) -> dict[str, Any]:
    """What an object holds by name, in a dictionary or in slots."""
    slots = [name for kind in type(value).__mro__ for name in vars(kind).get("__slots__", ()) if hasattr(value, name)]
    return {**getattr(value, "__dict__", {}), **{name: getattr(value, name) for name in slots}}
