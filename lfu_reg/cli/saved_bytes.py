"""Peak of the bytes that autograd keeps for backward passes, counted by storage: a memory figure for CPUs."""

from __future__ import annotations

import weakref
from types import TracebackType

import torch
from torch import Tensor


class SavedBytes:
    """Context in which `peak` is the largest number of bytes saved for backward at any one time.

    Parameters are not counted: they are there anyway. A storage that is saved twice counts once.
    """

    def __init__(self) -> None:
        self.now = 0
        self.peak = 0
        self._holders: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda packed: packed.tensor)

    def _pack(self, tensor: Tensor) -> _Packed:
        packed = _Packed(tensor)
        if isinstance(tensor, torch.nn.Parameter) or (
            tensor._base is not None and isinstance(tensor._base, torch.nn.Parameter)
        ):
            return packed
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()  # also of tensors without data
        self._holders[key] = self._holders.get(key, 0) + 1
        if self._holders[key] == 1:
            self.now += size
            self.peak = max(self.peak, self.now)
        weakref.finalize(packed, self._release, key, size)
        return packed

    def _release(self, key: int, size: int) -> None:
        self._holders[key] -= 1
        if self._holders[key] == 0:
            del self._holders[key]
            self.now -= size

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, value, trace)


class _Packed:
    """Holds a saved tensor, and can be watched by a weak reference."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # an output that a node keeps must not keep that node
