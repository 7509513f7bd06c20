"""Buffers that a forward pass updates (BatchNorm statistics, load counters) stay as pass 1 left them.

Only those that pass 1 changed are copied: the perturbed pass runs the same code, so it changes no others, and large
constant buffers (causal masks, packed weights) cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class BufferWatch:
    """Tells which buffers of a model a forward pass has changed.

    Args:
        model: module whose buffers are watched, from now on.
    """

    def __init__(self, model: nn.Module) -> None:
        self._before = {key: (buffer, buffer._version) for key, buffer in _buffers(model)}
        self._model = model

    def changed(self) -> list[tuple[nn.Module, str]]:
        """The buffers, as (module, name), that were written or replaced since construction."""
        return [
            key
            for key, buffer in _buffers(self._model)
            if (before := self._before.get(key)) is None or before[0] is not buffer or before[1] != buffer._version
        ]


@contextmanager
def restored(buffers: list[tuple[nn.Module, str]]) -> Iterator[None]:
    """Put the given buffers back, values and identity, when the block ends, also by an exception."""
    kept = [
        (module, name, tensor, tensor.clone())
        for module, name in buffers
        if (tensor := module._buffers[name]) is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, tensor, value in kept:
                tensor.copy_(value)
                module._buffers[name] = tensor


def _buffers(model: nn.Module) -> list[tuple[tuple[nn.Module, str], Tensor]]:
    return [
        ((module, name), buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
