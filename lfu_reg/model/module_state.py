"""What a forward changes in the modules of a model: buffers, counters, notes that they keep for each other.

Pass 2 is to start where pass 1 started, and what pass 1 has left is to be there after the step, as if only it had run.
Values are compared by identity and by version, so that a forward that changes nothing costs one walk over the modules.
"""

from __future__ import annotations

import operator
from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lfu_reg.model.patching import ABSENT

_CONTAINERS = (list, dict, OrderedDict, set, deque)
# Tables of a module whose entries are looked at one by one, or are no state of a forward.
_TABLES = frozenset(("_buffers", "_parameters", "_modules"))
# Larger containers are data, not notes.
_LARGEST = 1024
# Larger buffers of whole numbers are packed weights, which no forward writes to.
_PACKED = 2**24

Place = tuple[dict[str, Any], str]


class _Snapshot:
    """The values of all modules' attributes at one moment, and copies of the containers among them."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.values: list[tuple[nn.Module, dict[str, Any]]] = []
        self.contents: dict[int, tuple[Any, Any]] = {}
        for module in modules:
            inside = dict(vars(module))
            self.values.append((module, inside))
            for name, value in inside.items():
                kind = type(value)
                if kind in _CONTAINERS:
                    if value and name not in _TABLES and len(value) <= _LARGEST:
                        self.contents[id(value)] = value, kind(value)
                elif kind is torch.Generator:
                    self.contents[id(value)] = value, value.get_state()

    def restore(self) -> None:
        """Put every attribute and the contents of every container back to what they were."""
        for module, inside in self.values:
            now = vars(module)
            if not _same(now, inside):
                for name in [name for name in now if name not in inside]:
                    del now[name]
                now.update(inside)
            for name, value in now.items():
                filled = type(value) in _CONTAINERS and value and name not in _TABLES and len(value) <= _LARGEST
                if filled and id(value) not in self.contents:
                    value.clear()
        for container, content in self.contents.values():
            _put(container, content)


class StateWatch:
    """Tells what a forward pass changes.

    Args:
        model: the model that is watched, from now on.
        writers: modules that are known to write to their buffers, of which copies are made; None for all of them.
    """

    def __init__(self, model: nn.Module, writers: Collection[nn.Module] | None) -> None:
        self._modules = list(model.modules())
        self._start = _Snapshot(self._modules)
        self._weights = self._versions_of_weights()
        self._buffers: dict[tuple[int, str], tuple[Tensor, int, Tensor | None]] = {}
        for module in self._modules:
            for (table, name), tensor in _tensors_of(module):
                # Frozen weights are copied only where somebody is known to write to them, as to those of a teacher.
                known = module in writers if writers is not None else table is not module._parameters
                copied = known and _is_small(tensor)
                copy = tensor.detach().clone() if copied else None
                self._buffers[id(table), name] = tensor, _version_of(tensor), copy

    def changes(self) -> Changes:
        """What was changed since construction."""
        places: list[tuple[Place, Tensor | None]] = []
        writers: set[nn.Module] = set()
        late: list[str] = []
        for module in self._modules:
            weights = module._parameters  # those that were trained at the start are no state
            found = [(p, t) for p, t in _tensors_of(module) if p[0] is not weights or (id(p[0]), p[1]) in self._buffers]
            # All of a module's: batch norm writes its running statistics in native code, past the version counter.
            if not any(self._is_written(place, tensor) for place, tensor in found):
                continue
            writers.add(module)
            for (table, name), tensor in found:
                before, _, copy = self._buffers.get((id(table), name), (tensor, 0, None))
                replaced = before is not tensor
                places.append(((table, name), before if replaced else copy))
                written = self._is_written((table, name), tensor)
                if copy is None and written and not replaced and not tensor.requires_grad:
                    late.append(f"{type(module).__name__}.{name}")
        return Changes(
            self._modules, self._start, places, writers, late, weights=self._weights != self._versions_of_weights()
        )

    def _is_written(self, place: Place, tensor: Tensor) -> bool:
        before = self._buffers.get((id(place[0]), place[1]))
        return before is None or before[0] is not tensor or before[1] != _version_of(tensor)

    def _versions_of_weights(self) -> int:
        return versions_of(w for m in self._modules for w in m._parameters.values() if w is not None)


class Changes:
    """What pass 1 has changed, and how to begin again.

    Attributes:
        writers: modules that wrote to a buffer.
        late: buffers that were written to for the first time, of which there is no copy to begin from.
        weights: whether a trained weight was written to.
    """

    def __init__(
        self,
        modules: list[nn.Module],
        start: _Snapshot,
        buffers: list[tuple[Place, Tensor | None]],
        writers: set[nn.Module],
        late: list[str],
        *,
        weights: bool,
    ) -> None:
        self._start, self._end = start, _Snapshot(modules)
        self._buffers, self.writers, self.late, self.weights = buffers, writers, late, weights

    def in_containers_of(self, modules: Collection[nn.Module]) -> bool:
        """Whether the pass changed what is in a list or a mapping of one of the modules."""
        ends = {id(module): inside for module, inside in self._end.values}
        for module, inside in self._start.values:
            if module in modules:
                for value in (*inside.values(), *ends[id(module)].values()):
                    if type(value) in _CONTAINERS and not _unchanged(value, self._start, self._end):
                        return True
        return False

    @contextmanager
    def from_the_start(self, but: Collection[nn.Module] = ()) -> Iterator[None]:
        """Let the modules be as they were before pass 1, and put back afterwards what it has left.

        Args:
            but: modules that do not run again, and stay as pass 1 left them.
        """
        try:
            for module, inside in self._start.values:
                if module not in but and not _same(now := vars(module), inside):
                    for name in [name for name in now if name not in inside]:
                        del now[name]
                    now.update(inside)
            for key, (container, content) in self._start.contents.items():
                if not _equal(content, self._end.contents.get(key, (None, None))[1]):
                    _put(container, content)
            for key, (container, _) in self._end.contents.items():
                if key not in self._start.contents and type(container) in _CONTAINERS:
                    container.clear()
            with self.on_copies(self._buffers):
                yield
        finally:
            self._end.restore()

    @contextmanager
    def on_copies(self, buffers: Iterable[tuple[Place, Tensor | None]] | None = None) -> Iterator[None]:
        """Let copies of the buffers that pass 1 wrote to take their places, for forwards that a backward repeats.

        Copies, and not values put back afterwards: a graph of pass 1 may have saved the buffers themselves.
        """
        kept: list[tuple[Place, Any]] = []
        try:
            for (table, name), start in [(p, None) for p, _ in self._buffers] if buffers is None else buffers:
                tensor = table.get(name, ABSENT)
                kept.append(((table, name), tensor))
                source = tensor if start is None else start
                if isinstance(source, Tensor) and not source.requires_grad:
                    table[name] = source.detach().clone()
            yield
        finally:
            for (table, name), tensor in kept:
                if tensor is ABSENT:
                    table.pop(name, None)
                else:
                    table[name] = tensor


def versions_of(weights: Iterable[Tensor]) -> int:
    """The sum of the trained weights' version counters, which only grow."""
    return sum(weight._version for weight in weights if weight.requires_grad and not weight.is_inference())


def _tensors_of(module: nn.Module) -> Iterator[tuple[Place, Tensor]]:
    """Buffers, tensors that are plain attributes, and frozen weights."""
    inside = vars(module)
    for table in (inside["_buffers"], inside, inside["_parameters"]):
        for name, value in table.items():
            if isinstance(value, Tensor) and not (table is inside["_parameters"] and value.requires_grad):
                yield (table, name), value


def _is_small(tensor: Tensor) -> bool:
    packed = tensor.numel() > _PACKED and not tensor.is_floating_point()
    return not packed and not tensor.requires_grad and not tensor.is_meta


def _version_of(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return len(one) == len(other) and all(map(operator.is_, one.values(), other.values()))


def _unchanged(container: Any, start: _Snapshot, end: _Snapshot) -> bool:
    before, after = start.contents.get(id(container)), end.contents.get(id(container))
    return _equal(() if before is None else before[1], () if after is None else after[1])


def _equal(one: Any, other: Any) -> bool:
    """Whether two containers hold the same objects, or two generators are at the same place."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    if one is None or other is None or len(one) != len(other):
        return False
    if isinstance(one, dict) and isinstance(other, dict):
        return all(map(operator.is_, one, other)) and all(map(operator.is_, one.values(), other.values()))
    return all(map(operator.is_, one, other))


def _put(container: Any, content: Any) -> None:
    """Give a container the content that it had, in place: others may hold on to it."""
    if isinstance(container, torch.Generator):
        container.set_state(content)
    elif not _equal(container, content):
        container.clear()
        (container.extend if isinstance(container, (list, deque)) else container.update)(content)
