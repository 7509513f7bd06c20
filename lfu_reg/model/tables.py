"""Tables that a forward may write to: containers, generators, attributes. What was in them, and how to put it back."""

from __future__ import annotations

import copy
import operator
import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

CONTAINERS = (list, dict, OrderedDict, defaultdict, Counter, set, deque)
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
    elif _is_generator(value):
        found[id(value)] = value, owner
    elif not type(value).__module__.startswith(_FOREIGN):  # functions are of "builtins"
        attributes = getattr(value, "__dict__", None)
        if type(attributes) is dict:
            collect(attributes, owner, found, depth)


def _is_generator(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    kinds = () if numpy is None else (numpy.random.Generator, numpy.random.RandomState)
    return isinstance(value, (torch.Generator, random.Random, *kinds))


def copied(table: Any) -> Any:
    """What is in a table now."""
    return copy.copy(table) if type(table) in CONTAINERS else _access(table)[0]()


def _access(generator: Any) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    """How a generator gives its state and takes one."""
    if isinstance(generator, random.Random):
        return generator.getstate, generator.setstate
    if hasattr(generator, "get_state"):
        return generator.get_state, generator.set_state
    return lambda: generator.bit_generator.state, partial(setattr, generator.bit_generator, "state")


def holds(table: Any, before: Any) -> bool:
    """Whether a table holds the same objects as a copy of it, or a generator is where it was."""
    if isinstance(table, dict):
        return [*table] == [*before] and all(map(operator.is_, table.values(), before.values()))
    if type(table) in CONTAINERS:
        same = table == before if type(table) is set else all(map(operator.is_, table, before))
        return len(table) == len(before) and same
    now = copied(table)
    return torch.equal(now, before) if isinstance(now, Tensor) else repr(now) == repr(before)


def put(table: Any, before: Any) -> None:
    """Give a table the content that it had, in place: others may hold on to it."""
    if holds(table, before):
        return
    if type(table) is dict:
        for name in [name for name in table if name not in before]:
            del table[name]
        table.update(before)
    elif type(table) in CONTAINERS:
        table.clear()  # to have the order that it had
        (table.update if isinstance(table, (set, dict)) else table.extend)(before)
    else:
        _access(table)[1](before)
