"""Which calls belong to one step: an optimizer may ask for the same loss several times before it has made its step.

L-BFGS evaluates its closure at several points of one step, and a line search needs the same function at each. So LoRA's
A and the samples that are drawn stay the same inside of one `optimizer.step(closure)`, and where the batch and the
weights are those of the call before.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from lfu_reg.model.module_state import versions_of
from lfu_reg.model.walk import parameters_of
from lfu_reg.step.sft_loss import tensors_in


class SameStep:
    """Tells calls that repeat one step from those that begin a new one."""

    def __init__(self) -> None:
        self._running, self._optimizer_steps = 0, 0
        self._last: tuple[int, list[weakref.ref[Tensor]], int] | None = None
        self._in_closure: int | None = None
        me = weakref.ref(self)  # torch's table of hooks is the process's
        self._handles = [
            register_optimizer_step_pre_hook(lambda *call: _count(me, 1)),
            register_optimizer_step_post_hook(lambda *call: _count(me, -1)),
        ]
        for handle in self._handles:
            weakref.finalize(self, handle.remove)

    def remove(self) -> None:
        """Stop counting optimizer steps."""
        for handle in self._handles:
            handle.remove()

    def is_in_closure(self) -> bool:
        """Whether this call comes from a closure that has called before in the same `optimizer.step`."""
        current = self._optimizer_steps if self._running > 0 else None
        again = current is not None and current == self._in_closure
        self._in_closure = current
        return again

    def repeats(self, model: nn.Module, batch: Any) -> bool:
        """Whether the batch's tensors and the trained weights are those of the call before."""
        tensors = list(_some(tensors_in(batch)))
        version = versions_of(parameters_of(model))
        last, self._last = self._last, (version, [weakref.ref(tensor) for tensor in tensors], id(model))
        if last is None or not tensors or last[0] != version or last[2] != id(model) or len(last[1]) != len(tensors):
            return False
        return all(ref() is tensor for ref, tensor in zip(last[1], tensors, strict=True))


def _count(me: weakref.ref[SameStep], change: int) -> None:
    this = me()
    if this is not None:
        this._running = max(this._running + change, 0)
        this._optimizer_steps += change > 0


def _some(tensors: Iterable[Tensor], most: int = 8) -> Iterable[Tensor]:
    for number, tensor in enumerate(tensors):
        if number == most:
            return
        yield tensor
