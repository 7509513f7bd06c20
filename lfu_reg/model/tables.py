"""Tables that a forward may write to: containers, generators, attributes. What was in them, and how to put it back."""

from __future__ import annotations

import operator
import sys
from collections import OrderedDict, deque
from typing import Any

import torch
from torch import Tensor, nn

CONTAINERS = (list, dict, OrderedDict, set, deque)
DEEPEST = 3  # containers in containers
_LARGEST = 1024  # entries; larger containers are data
_FOREIGN = ("torch", "accelerate", "deepspeed", "builtins", "threading", "_thread")


def collect(value: Any, owner: nn.Module, found: dict[int, tuple[Any, nn.Module]], depth: int) -> None:
    """Note a container, a generator or a plain object's attributes, and what is in them."""
    if id(value) in found or not depth or isinstance(value, (Tensor, nn.Module, type, str, int, float)):
        return
    if type(value) in CONTAINERS:
        if len(value) <= _LARGEST:
            found[id(value)] = value, owner
            for entry in value.values() if isinstance(value, dict) else value:
                collect(entry, owner, found, depth - 1)
    elif isinstance(value, torch.Generator) or _is_numpy_generator(value):
        found[id(value)] = value, owner
    elif not callable(value) and not type(value).__module__.startswith(_FOREIGN):
        attributes = getattr(value, "__dict__", None)
        if type(attributes) is dict:
            collect(attributes, owner, found, depth)


def _is_numpy_generator(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.random.Generator)


def copied(table: Any) -> Any:
    """What is in a table now."""
    if type(table) in CONTAINERS:
        return type(table)(table)
    return table.get_state() if isinstance(table, torch.Generator) else table.bit_generator.state


def holds(table: Any, copy: Any) -> bool:
    """Whether a table holds the same objects as a copy of it, or a generator is where it was."""
    kind = type(table)
    if kind is dict or kind is OrderedDict:
        return len(table) == len(copy) and all(map(operator.is_, table.values(), copy.values())) and [*table] == [*copy]
    if kind in CONTAINERS:
        return len(table) == len(copy) and (table == copy if kind is set else all(map(operator.is_, table, copy)))
    if isinstance(table, torch.Generator):
        return torch.equal(table.get_state(), copy)
    return repr(table.bit_generator.state) == repr(copy)


def put(table: Any, copy: Any) -> None:
    """Give a table the content that it had, in place: others may hold on to it."""
    if holds(table, copy):
        return
    if type(table) is dict:
        for name in [name for name in table if name not in copy]:
            del table[name]
        table.update(copy)
    elif type(table) in CONTAINERS:
        table.clear()  # to have the order that it had
        (table.update if isinstance(table, (set, dict)) else table.extend)(copy)
    elif isinstance(table, torch.Generator):
        table.set_state(copy)
    else:
        table.bit_generator.state = copy
