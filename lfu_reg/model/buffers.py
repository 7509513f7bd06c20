"""What a forward pass writes to: buffers (BatchNorm statistics, load counters) stay as pass 1 left them.

Only those that pass 1 changed are copied: the perturbed pass runs the same code, so it changes no others, and large
constant buffers (causal masks, packed weights) cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from lfu_reg.hooks.inplace import version_of
from lfu_reg.model.module_walk import modules_of


class ForwardWatch:
    """Tells what a forward pass has written to.

    Args:
        model: module whose buffers and trained weights are watched, from now on.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        buffers, self._weights = _state_of(model)
        self._before = {key: (buffer, version_of(buffer)) for key, buffer in buffers}

    def changed(self) -> tuple[list[tuple[nn.Module, str]], bool]:
        """What was written to or replaced since construction.

        Returns:
            The buffers, as (module, name), of all modules of which one was; and whether a trained weight was.
        """
        # All of a module's: batch norm writes its running statistics in native code, past the version counter.
        now, weights = _state_of(self._model)
        writing = {
            key[0]
            for key, buffer in now
            if (before := self._before.get(key)) is None or before[0] is not buffer or before[1] != version_of(buffer)
        }
        return [key for key, _ in now if key[0] in writing], weights != self._weights


@contextmanager
def on_copies(buffers: list[tuple[nn.Module, str]]) -> Iterator[None]:
    """Let copies of the given buffers take their places for the block, also if an exception ends it.

    Copies, and not values put back afterwards: a graph of pass 1 may have saved the buffers themselves.
    """
    kept = [(module, name, module._buffers[name]) for module, name in buffers]
    try:
        for module, name, buffer in kept:
            module._buffers[name] = None if buffer is None else buffer.clone()
        yield
    finally:
        for module, name, buffer in kept:
            module._buffers[name] = buffer


def _state_of(model: nn.Module) -> tuple[list[tuple[tuple[nn.Module, str], Tensor]], int]:
    """Every buffer by (module, name), and the sum of the trained weights' versions, which only grow."""
    buffers: list[tuple[tuple[nn.Module, str], Tensor]] = []
    versions = 0
    for module in modules_of(model):
        inside = vars(module)
        for name, buffer in inside["_buffers"].items():
            if buffer is not None:
                buffers.append(((module, name), buffer))
        for weight in inside["_parameters"].values():
            if weight is not None and weight.requires_grad:
                versions += weight._version
    return buffers, versions
