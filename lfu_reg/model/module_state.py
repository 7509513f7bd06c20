"""What a forward changes in a model, so that pass 2 can start where pass 1 did and leave no trace.

Looked at are buffers, weights, and what modules note in their attributes, in containers among these and in plain
objects such as a config: counters, flags, lists, generators. Values are compared by identity and by version, so that a
forward that changes nothing costs little more than a copy of some small tables.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from lfu_reg.model.patching import EVERYBODYS, patched
from lfu_reg.model.tables import DEEPEST, NO_TABLES, collect, copied, holds, is_new_in, put

# Of the attributes that every module has, those that a forward may write to.
_TABLES = ("_buffers", "_forward_hooks", "_forward_pre_hooks")
_ENGINES = ("torch.nn.parallel", "torch.distributed", "torch._dynamo", "accelerate", "deepspeed", "lightning.fabric")
_SMALL = 2**20  # entries; larger frozen weights are not copied before it is known that they are written to
_LOOKS = 5  # forwards of which values are compared as well, since versions do not tell of writes to `.data`
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
        self._model = self._whole = model
        self._modules: list[nn.Module] = []
        self._tree: list[Any] = [None]  # what is watched, with the children of each module
        self._last: list[tuple[Any, Any]] = []  # tables as the last forward left them
        self._begun = 0  # how many forwards there have been
        self._written: set[tuple[int, Any]] | None = None  # to which forwards are known to write
        self._rewritten: dict[int, Tensor] = {}  # weights, and tensors in lists, that forwards write to
        self._unchanged: set[int] = set()  # which of them have their values afterwards

    def begin(self, whole: nn.Module | None = None, *, attributes: bool = True, held: Sequence[Any] = ()) -> None:
        """A forward is about to run, of `whole` and what is `held` beside it; engines keep notes in `attributes`."""
        self._whole = self._model if whole is None else whole
        tree = [*map(id, (self._whole, *held)), *([*module._modules.values()] for module in self._modules)]
        if tree != self._tree or any(is_new_in(table, old) for table, old in self._last):
            self._list(held)
        tables, self._begun = self._tables if attributes else [], self._begun + 1
        self._sizes = [_size(module) for module in self._modules]
        self._start = [(table, copied(table), owner) for table, owner in tables if not isinstance(table, dict) or table]
        self._empty = [(table, owner) for table, owner in tables if isinstance(table, dict) and not table]
        self._marks = [self._mark(weight) for weight in self._weights]
        small = [w for w in self._weights if self._begun == 1 and w.numel() <= _SMALL and not w.requires_grad]
        self._copies = {id(weight): weight.detach().clone() for weight in [*self._rewritten.values(), *small]}
        self._before: dict[tuple[int, Any], tuple[Tensor, Any, Tensor | None]] = {}
        for place in self._places:
            tensor = place.table.get(place.key)
            if isinstance(tensor, Tensor) and not tensor.is_inference():
                self._before[place.identity] = tensor, self._mark(tensor), self._kept(place, tensor)

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
        self._written = (self._written or set()) | {place.identity for place, _ in buffers}
        pairs = zip(self._weights, self._marks, strict=True)
        touched = {id(w): w for w, mark in pairs if self._mark(w) != mark and type(w) in (nn.Parameter, Tensor)}
        # Some are only replaced and put back (PEFT's adapters of single parameters), which a copy shows.
        frozen = {i for i in touched if i in self._rewritten and not touched[i].requires_grad and self._begun > _LOOKS}
        self._unchanged |= {i for i in frozen if torch.equal(touched[i], self._copies[i])}
        found = {i: w for i, w in (self._rewritten | touched).items() if i not in self._unchanged}
        if lost := [i for i in found if i not in self._copies]:
            names = {id(weight): name for name, weight in self._whole.named_parameters() if weight.requires_grad}
            late += [names.get(i, "a tensor in a list") for i in lost if i in names or i in self._in_lists]
        sizes = zip(self._modules, self._sizes, strict=True)
        late += [f"{type(m).__name__}, where it made modules or parameters" for m, size in sizes if _size(m) > size]
        self._rewritten = found
        rewritten = [(weight, self._copies.get(key)) for key, weight in self._rewritten.items()]
        grown: list[Any] = [(table, {}, owner) for table, owner in self._empty if table]
        result = Changes([*self._start, *grown], buffers, late, rewritten)
        if any(is_new_in(new, old) for _, old, new, _ in result.found):  # these have contents of their own
            self._tree = [None]
        self._last = result.end
        return result

    def _mark(self, tensor: Tensor) -> Any:
        """What is another one after a write to the tensor."""
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_meta
        if self._begun > _LOOKS or not plain or not tensor.untyped_storage().nbytes():  # as FSDP1 frees it
            return tensor._version
        few = tensor.detach().reshape(-1)[:: tensor.numel() // 4 + 1].tolist()
        return tensor._version, tensor.data_ptr(), str(few)

    def _list(self, held: Sequence[Any]) -> None:
        """List the tables that a forward may change, and the places of tensors."""
        roots = [self._whole, *(value for value in held if isinstance(value, nn.Module))]
        around = [m for root in roots for m in root.modules() if not type(m).__module__.startswith(_ENGINES)]
        every = dict.fromkeys([*self._model.modules(), *around])
        scripted = {m for m in every if isinstance(m, torch.jit.ScriptModule)}  # whose tables are in native code
        self._modules = [module for module in every if module not in scripted]
        found: dict[int, Any] = {id(t): (t, m) for m in scripted for t in (*m.parameters(), *m.buffers())}
        self._places: list[Place] = []
        for module in self._modules:
            inside = vars(module)
            for table in (inside, *(inside[name] for name in _TABLES)):
                found[id(table)] = table, module
            for name, value in inside.items():
                if name not in EVERYBODYS and not isinstance(value, Tensor):
                    collect(value, module, found, DEEPEST)
        for value in held:
            collect(value, self._model, found, DEEPEST)
        kept = [value for value, _ in found.values() if issubclass(type(value), nn.Module)]  # but for weakref.proxy
        if hidden := [module for module in kept if module not in {*self._modules, *roots}]:
            self._list([*held, *hidden])  # modules that others keep in lists or objects
        self._tree = [*map(id, (self._whole, *held)), *([*module._modules.values()] for module in self._modules)]
        if hidden:
            return
        self._in_lists = {key: value for key, (value, _) in found.items() if isinstance(value, Tensor)}
        self._tables = [pair for pair in found.values() if not isinstance(pair[0], NO_TABLES)]
        for table, _ in self._tables:
            if isinstance(table, dict):
                names = [n for n, v in table.items() if isinstance(v, Tensor)]
                self._places += [Place(table, name) for name in names]
        weights = [*(w for module in self._modules for w in module._parameters.values()), *self._in_lists.values()]
        self._weights: list[Tensor] = [weight for weight in weights if weight is not None and not weight.is_inference()]
        self.trained = [weight for weight in self._weights if weight.requires_grad]

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
        is_known = place.identity in (self._written or ())  # later on nobody looks at values
        return is_known or before[0] is not tensor or before[1] != self._mark(tensor)


def _size(module: nn.Module) -> int:
    """How many modules and parameters a module has."""
    return sum(value is not None for value in (*module._modules.values(), *module._parameters.values()))


class Changes:
    """What pass 1 has changed, and how to begin again."""

    def __init__(
        self,
        start: list[tuple[Any, Any, nn.Module]],  # tables, what was in them, and the modules that they belong to
        buffers: list[tuple[Place, Tensor | None]],  # what was written to or replaced, and copies to begin from
        late: list[str],  # names of those that were written to for the first time, of which there is no copy
        weights: list[tuple[Tensor, Tensor | None]],  # and tensors in lists, as `buffers`
    ) -> None:
        self.late, self.weights, self._buffers = late, weights, buffers
        self.end = [(table, before if holds(table, before) else copied(table)) for table, before, _ in start]
        pairs = zip(start, self.end, strict=True)
        self.found = [(table, old, new, owner) for (table, old, owner), (_, new) in pairs if old is not new]

    def in_containers_of(self, modules: Collection[nn.Module]) -> bool:
        """Whether the pass changed what is in a list or a mapping of one of the modules."""
        return any(owner in modules and table is not vars(owner) for table, _, _, owner in self.found)

    @contextmanager
    def from_the_start(self, but: Collection[nn.Module] = ()) -> Iterator[None]:
        """Let the model be as before pass 1 in the block, `but` for modules that do not run again; then as after it."""
        try:
            for table, before, _, owner in self.found:
                if owner not in but:
                    put(table, before)
            with self._standing_in(start=True), self._in_other_memory(start=True):
                yield
        finally:
            for table, after in self.end:
                put(table, after)

    @contextmanager
    def on_copies(self) -> Iterator[None]:
        """Let copies of what pass 1 wrote to take its place, for forwards that a backward repeats."""
        # Copies, and not values put back afterwards: a graph of pass 1 may have saved the tensors themselves.
        with self._standing_in(start=False), self._in_other_memory(start=False):
            yield

    @contextmanager
    def _in_other_memory(self, *, start: bool) -> Iterator[None]:
        # For the same parameters, whose gradients are wanted; a graph of pass 1 may have saved them.
        with ExitStack() as afterwards:
            for weight, before in self.weights:
                now = weight.data
                afterwards.enter_context(_unsafe_preserve_version_counter(weight))
                afterwards.callback(setattr, weight, "data", now)
                weight.data = (before if start and before is not None else now).clone()
            yield

    def _standing_in(self, *, start: bool) -> AbstractContextManager[None]:
        sources = [(p, before if start and before is not None else p.table.get(p.key)) for p, before in self._buffers]
        own = [(p, v) for p, v in sources if isinstance(v, Tensor) and not v.requires_grad]
        return patched([(place.table, place.key, value.detach().clone()) for place, value in own])
