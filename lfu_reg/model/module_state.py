"""What a forward changes in a model, so that pass 2 can start where pass 1 did and leave no trace.

Looked at are buffers, weights, and what modules note in their attributes, in containers among these and in plain
objects such as a config: counters, flags, lists, generators. Values are compared by identity and by version, so that a
forward that changes nothing costs little more than a copy of some small tables.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lfu_reg.model.patching import ABSENT, EVERYBODYS, Patch, patched
from lfu_reg.model.tables import CONTAINERS, DEEPEST, collect, copied, holds, put

# Of the attributes that every module has, those that a forward may write to.
_TABLES = ("_buffers", "_forward_hooks", "_forward_pre_hooks")
_PACKED = 2**24  # entries; larger buffers of whole numbers are packed weights


class Place(NamedTuple):
    """Where a tensor is kept: a dictionary, a key of it."""

    table: dict[Any, Any]
    key: Any

    @property
    def identity(self) -> tuple[int, Any]:
        """What tells it from other places."""
        return id(self.table), self.key


class ModuleState:
    """Watches the forwards of a model."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules: list[nn.Module] = []
        self._sizes: list[int] = []
        self._followers: list[Place] = []  # frozen weights that forwards write to
        self._unchanged: set[tuple[int, Any]] = set()  # those that have their values afterwards
        self._written: set[tuple[int, Any]] | None = None  # to which forwards are known to write
        self._rewritten: list[Tensor] = []  # trained weights that forwards write to

    def begin(self, *, attributes: bool = True) -> None:
        """A forward is about to run; only tensors are watched where engines keep notes of it in `attributes`."""
        if not self._modules or self._sizes != [len(module._modules) for module in self._modules]:
            self._list()
        tables = self._tables if attributes else []
        self._start = [(table, copied(table), owner) for table, owner in tables if table]
        self._empty = [(table, owner) for table, owner in tables if not table]
        self._versions = [weight._version for weight in self._weights]
        self._copies = {id(weight): weight.detach().clone() for weight in self._rewritten}
        self._before: dict[tuple[int, Any], tuple[Tensor, int, Tensor | None]] = {}
        for place in self._places:
            tensor = place.table.get(place.key)
            if isinstance(tensor, Tensor) and not tensor.is_inference():
                self._before[place.identity] = tensor, tensor._version, self._kept(place, tensor)

    def changes(self) -> Changes:
        """What the forward has changed since `begin`."""
        tensors = [(place, place.table.get(place.key)) for place in self._places]
        written = {p.identity for p, t in tensors if self._is_written(p, t)}
        # All of a module's buffers: batch norm writes to its statistics in native code, past the version counter.
        tables = {table for table, _ in written}
        buffers: list[tuple[Place, Tensor | None]] = []
        late: list[str] = []
        for place, tensor in tensors:
            if place.identity[0] in tables:
                old, _, copy = self._before.get(place.identity, (None, 0, None))
                buffers.append((place, copy if old is tensor else None))
                in_place = place.identity in written and old is tensor
                if in_place and copy is None and old is not None and not old.requires_grad:
                    late.append(str(place.key))
        buffers += self._written_weights()
        self._written = (self._written or set()) | {place.identity for place, _ in buffers}
        pairs = zip(self._weights, self._versions, strict=True)
        weights = {id(w): w for w, v in pairs if w.requires_grad and w._version != v and type(w) is nn.Parameter}
        if new := {key: weight for key, weight in weights.items() if key not in self._copies}:
            late += [name for name, weight in self._model.named_parameters() if id(weight) in new]
            self._rewritten += new.values()
        grown = [(table, type(table)(), owner) for table, owner in self._empty if table]
        result = Changes(
            [*self._start, *grown], buffers, late, [(weight, self._copies.get(key)) for key, weight in weights.items()]
        )
        if result.brought_new_objects:  # these have contents of their own
            self._modules = []
        return result

    def _written_weights(self) -> list[tuple[Place, Tensor | None]]:
        """Frozen weights that were written to, as a teacher's are, and are copied from the next forward on."""
        # Some are only replaced and put back (PEFT's adapters of single parameters), which a copy shows.
        for place in [place for place in self._followers if self._is_as_it_was(place)]:
            self._followers.remove(place)
            self._places.remove(place)
            self._unchanged.add(place.identity)
        if self._versions == [weight._version for weight in self._weights]:
            return []
        pairs = zip(self._weights, self._versions, strict=True)
        frozen = {id(w) for w, version in pairs if not w.requires_grad and w._version != version}
        known = {place.identity for place in self._places} | self._unchanged
        found: list[tuple[Place, Tensor | None]] = []
        for module in self._modules:
            for name, weight in module._parameters.items():
                place = Place(module._parameters, name)
                if id(weight) in frozen and place.identity not in known:
                    found.append((place, None))
        self._places += [place for place, _ in found]
        self._followers += [place for place, _ in found]
        return found

    def _is_as_it_was(self, place: Place) -> bool:
        tensor, _, copy = self._before.get(place.identity, (None, 0, None))
        same = tensor is not None and tensor is place.table.get(place.key)
        return same and copy is not None and bool(torch.equal(copy, place.table[place.key]))

    def _list(self) -> None:
        """List the tables that a forward may change, and the places of tensors."""
        self._modules = list(self._model.modules())
        self._sizes = [len(module._modules) for module in self._modules]
        found: dict[int, tuple[Any, nn.Module]] = {}
        self._places = list(self._followers)
        for module in self._modules:
            inside = vars(module)
            for table in (inside, *(inside[name] for name in _TABLES)):
                found[id(table)] = table, module
            for name, value in inside.items():
                if name not in EVERYBODYS:
                    collect(value, module, found, DEEPEST)
        self._tables = list(found.values())
        for table, _ in self._tables:
            if isinstance(table, dict):
                names = [n for n, v in table.items() if isinstance(v, Tensor)]
                self._places += [Place(table, name) for name in names]
        parameters = (weight for module in self._modules for weight in module._parameters.values())
        self._weights = [weight for weight in parameters if weight is not None and not weight.is_inference()]

    def _kept(self, place: Place, tensor: Tensor) -> Tensor | None:
        """A copy to begin again from, of what is written to, or may be at a first step."""
        if tensor.requires_grad or tensor.is_meta:
            return None
        if self._written is None:
            large = tensor.numel() > _PACKED and not tensor.is_floating_point()
            return None if large else tensor.detach().clone()
        return tensor.detach().clone() if place.identity in self._written else None

    def _is_written(self, place: Place, tensor: Any) -> bool:
        before = self._before.get(place.identity)
        if before is None or not isinstance(tensor, Tensor):
            return isinstance(tensor, Tensor) != (before is not None)
        return before[0] is not tensor or before[1] != tensor._version


class Changes:
    """What pass 1 has changed, and how to begin again."""

    def __init__(
        self,
        start: list[tuple[Any, Any, nn.Module]],  # tables, what was in them, and the modules that they belong to
        buffers: list[tuple[Place, Tensor | None]],  # what was written to or replaced, and copies to begin from
        late: list[str],  # names of those that were written to for the first time, of which there is no copy
        weights: list[tuple[Tensor, Tensor | None]],  # trained ones that were written to, and copies to begin from
    ) -> None:
        self.late, self.weights = late, weights
        self._buffers = buffers
        # With what is in them now, which is the same object where nothing has changed.
        self._tables = [(t, before, before if holds(t, before) else copied(t), owner) for t, before, owner in start]
        self._changed = [entry for entry in self._tables if entry[1] is not entry[2]]

    @property
    def brought_new_objects(self) -> bool:
        """Whether a tensor or a container is now where another value was."""
        return any(
            isinstance(value, (Tensor, *CONTAINERS)) and before.get(name) is not value
            for _, before, after, _ in self._changed
            if isinstance(after, dict)
            for name, value in after.items()
        )

    def in_containers_of(self, modules: Collection[nn.Module]) -> bool:
        """Whether the pass changed what is in a list or a mapping of one of the modules."""
        return any(owner in modules and table is not vars(owner) for table, _, _, owner in self._changed)

    @contextmanager
    def from_the_start(self, but: Collection[nn.Module] = ()) -> Iterator[None]:
        """Let the model be as before pass 1 in the block, `but` for modules that do not run again; then as after it."""
        try:
            for table, before, _, owner in self._changed:
                if owner not in but:
                    put(table, before)
            with self._standing_in(start=True), self._weights_from_the_start():
                yield
        finally:
            for table, _, after, _ in self._tables:
                put(table, after)

    def on_copies(self) -> AbstractContextManager[None]:
        """Let copies of what pass 1 wrote to take its place, for forwards that a backward repeats."""
        # Copies, and not values put back afterwards: a graph of pass 1 may have saved the tensors themselves.
        return self._standing_in(start=False)

    @contextmanager
    def _weights_from_the_start(self) -> Iterator[None]:
        # Other memory for the same parameters, whose gradients are wanted.
        kept = [(weight, weight.data) for weight, _ in self.weights]
        try:
            for weight, before in self.weights:
                weight.data = (weight.data if before is None else before).clone()
            yield
        finally:
            for weight, now in kept:
                weight.data = now

    def _standing_in(self, *, start: bool) -> AbstractContextManager[None]:
        replaced: list[Patch] = []
        for place, before in self._buffers:
            now = place.table.get(place.key, ABSENT)
            source = before if start and before is not None else now
            if isinstance(source, Tensor) and not source.requires_grad:
                source = source.detach().clone()
                # A frozen weight stays one: parametrisations ask for the class.
                source = nn.Parameter(source, False) if isinstance(now, nn.Parameter) else source
            if source is not ABSENT:
                replaced.append((place.table, place.key, source))
        return patched(replaced)
