"""What stacks of layers are called with before any perturbation can reach it: the same in both passes, or else.

A loss function that does not repeat (its own generator, an iterator, a counter) feeds pass 2 with other data, and the
consistency term would measure that. So the first layer of every stack, and the model itself, note what they are given.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lfu_reg.auxiliaries.base import Auxiliary
from lfu_reg.hooks.forward_pass import Entry, ForwardPass
from lfu_reg.hooks.taps import depends_on_a_tap
from lfu_reg.model.layers import find_stacks
from lfu_reg.model.tables import tensors_in

MODEL = ""
FROM_EARLIER = (
    " (as it does where it is made of an earlier call's output or gradient, which the perturbation moves: an "
    "adversarial example, say, which is to be made before and put in the batch)"
)


class Entries:
    """Notes what the model and the first layer of each stack are called with."""

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], auxiliary: Auxiliary) -> None:
        self._auxiliary = auxiliary
        firsts = {stack[0] for stack in find_stacks(model)} | {next(iter(layers), MODEL)}
        self.modules = {MODEL: model, **{name: model.get_submodule(name) for name in sorted(firsts)}}
        self.listening = False
        self.fwd: ForwardPass | None = None  # the pass whose forward is running; `ModelHooks` sets both

    def on_call(self, name: str, compiled: bool, module: nn.Module, args: Any, kwargs: Any) -> None:
        """What the hook on `name` does before the module runs."""
        fwd = self.fwd
        if fwd is None:
            return
        call = fwd.record.calls[name]
        fwd.record.calls[name] += 1
        if not torch.is_grad_enabled():
            return
        given = [value for value in tensors_in((*args, *kwargs.values())) if not value.is_meta]
        if name == MODEL:
            numbers = [float(value) for value in (*args, *kwargs.values()) if isinstance(value, (int, float))]
            kept = given + ([torch.tensor(numbers, dtype=torch.float64, device="cpu")] if numbers else [])
        else:
            kept = [value for value in given if value.is_floating_point()][:1] or given[:1]
        if not any(self._is_reached(value, fwd) for value in kept):
            fwd.record.entries.append(Entry(name, call, tuple(value.detach().clone() for value in kept)))

    def _is_reached(self, value: Tensor, fwd: ForwardPass) -> bool:
        """Whether a perturbation could change the value in pass 2; only pass 1 is asked."""
        if value.grad_fn is None or fwd.apply:
            return False
        if self._auxiliary.moves_weights:
            return True
        return bool(fwd.record.fired) and depends_on_a_tap(value)


def differing(clean: Iterable[Entry], again: Iterable[Entry], samples: Tensor | None, moved: bool) -> str | None:
    """What pass 2, of some `samples` or all, was given that differs from what pass 1 was given; None if nothing."""
    found = {(entry.name, entry.call): entry for entry in again}
    for entry in clean:
        if moved and entry.name != MODEL:  # weights are moved, which reaches all inputs but the model's own
            continue
        other = found.get((entry.name, entry.call))
        called = f"{entry.name or 'the model'}'s call {entry.call + 1}"
        if other is None:
            return f"{called} did not take place"
        pairs = zip(entry.tensors, other.tensors, strict=False)
        if len(entry.tensors) != len(other.tensors) or not all(_equal(*pair, samples) for pair in pairs):
            return f"the input of {called} differs{FROM_EARLIER if entry.call else ''}"
    return None


def _equal(before: Tensor, after: Tensor, samples: Tensor | None) -> bool:
    is_part = samples is not None and before.dim() > 0 and before.shape != after.shape
    if is_part:
        assert samples is not None
        if before.shape[0] <= int(samples[-1]):
            return False
        before = before.index_select(0, samples.to(before.device))
    if (before.shape, before.dtype, before.layout) != (after.shape, after.dtype, after.layout):
        return False
    if before.is_nested:
        return all(_equal(was, now, None) for was, now in zip(before.unbind(), after.unbind(), strict=True))
    if before.layout is not torch.strided:  # an adjacency matrix, say; nothing compares sparse tensors
        sparse = [tensor.to_sparse(layout=torch.sparse_coo).coalesce() for tensor in (before, after)]
        parts = zip(*((coo.indices(), coo.values()) for coo in sparse), strict=True)
        return all(_equal(was, now, None) for was, now in parts)
    if (same := torch.equal(before, after)) or not before.is_floating_point():
        return same
    if before.device.type == "cpu" and not is_part:
        return bool(torch.allclose(before, after, rtol=0.0, atol=0.0, equal_nan=True))
    # Kernels on a GPU, and those for fewer rows, need not repeat to the last bit; other data is off by much more.
    return bool((after - before).float().norm() <= 32 * torch.finfo(before.dtype).eps * before.float().norm())
