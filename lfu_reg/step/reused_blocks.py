"""Blocks that no perturbation reaches answer pass 2 with what they returned in pass 1.

      embedding, blocks below ──► cut ──► blocks that theta_aux acts in or behind ──► l_SFT, l_cons
      └──────── reused ───────┘

Pass 2 runs the model's own code, which makes masks, positions and whatever else it hands to the blocks; only the
forward methods of the blocks below the cut are replaced for the pass. What they return is detached, but for the hidden
state of the last one, from which a gradient is taken: see `shared_backward.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from lfu_reg.hooks.forward_pass import ForwardPass, State
from lfu_reg.hooks.gated_hook import Hook
from lfu_reg.model import outputs
from lfu_reg.model.checkpoints import can_tell_who_saves, saves_elsewhere
from lfu_reg.model.layers import find_stacks
from lfu_reg.model.module_state import Changes
from lfu_reg.model.patching import Patch
from lfu_reg.model.rng import RandomState
from lfu_reg.model.tables import tensors_in


@dataclass(frozen=True)
class Answer:
    """What one block returned in pass 1."""

    output: Any  # as it left the forward method, before any hook
    path: outputs.Path  # of the hidden state in it
    version: int  # of the hidden state
    random_state: RandomState  # when the block had finished

    @property
    def hidden(self) -> Tensor:
        """The hidden state."""
        return outputs.get(self.output, self.path)


class ReusedBlocks:
    """Records what the blocks below the cut return, and answers with it."""

    def __init__(
        self,
        model: nn.Module,
        layers: Collection[str],
        sites: Collection[str] | None,
        devices: Callable[[], list[torch.device]],
    ) -> None:
        names = _below(model, layers, sites) if can_tell_who_saves() else []
        # By name, in order; none where there is nothing to reuse, or `sites` is None, as the auxiliary acts elsewhere.
        self.blocks = {name: model.get_submodule(name) for name in names}
        self.inside = {module for block in self.blocks.values() for module in block.modules()}
        self._sites, self._devices = frozenset(sites or ()), devices
        self.listening = False
        self._fwd: ForwardPass | None = None
        self._forwards: dict[str, Any] = {}
        self.forget()

    def forget(self) -> None:
        """Drop what was recorded; it holds on to the graph."""
        self._answers: dict[str, Answer] = {}
        self._refused = self._sees_a_cache = False

    def refuse(self) -> None:
        """Reuse nothing from now on."""
        self.blocks, self.inside = {}, set()

    @contextmanager
    def recording(self, fwd: ForwardPass, wanted: bool) -> Iterator[None]:
        """Record what the blocks return in this pass, whose forward is in the block."""
        self.forget()
        self._fwd, self.listening = fwd, wanted and bool(self.blocks)
        self._forwards = {name: vars(block).get("forward") for name, block in self.blocks.items()}
        try:
            yield
        finally:
            self._fwd, self.listening = None, False

    def on_call(self, name: str, compiled: bool, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """What the hook on block `name` does."""
        fwd = self._fwd
        if fwd is None or self._refused or not torch.is_grad_enabled():
            return
        path = outputs.locate(output)
        reached = any(fwd.record.fired[site] for site in self._sites)
        given = (*args, *kwargs.values())
        # A second tensor would take a gradient of l_cons past the cut, also where l_SFT has none to tell of it.
        plain = len({id(tensor) for tensor in tensors_in((output,)) if tensor.requires_grad}) < 2
        plain = plain and all(map(_is_plain, given)) and _is_plain(output)
        # A forward that the loss function has put in place for the call would wrap the answer once more.
        plain = plain and vars(module).get("forward") is self._forwards[name]
        if compiled or path is None or reached or name in self._answers or not plain or saves_elsewhere():
            self._refused = True
            return
        self._sees_a_cache = self._sees_a_cache or any(map(outputs.is_cache, given))
        hidden = outputs.get(output, path)
        self._answers[name] = Answer(output, path, hidden._version, RandomState.capture(self._devices()))

    def cut(self, changes: Changes, states: Iterable[State]) -> Tensor | None:
        """Hidden state at which the reused part of pass 1's graph ends; None where nothing can be reused."""
        if self._refused or not self.blocks or list(self._answers) != list(self.blocks):
            return None
        # Pass 2 would use the weights that pass 1 has written to, but below the cut; and foreign hooks inside of blocks
        # would not fire, or see the sum of both terms' gradients.
        if changes.weights or changes.in_containers_of(self.inside) or self._are_hooked():
            return None
        # The model may write over what a block returned, or what a tap has put on its memory, and so into the answer.
        if any(answer.hidden._version != answer.version for answer in self._answers.values()):
            return None
        if any(state.watch is None or state.watch.was_written for state in states if state.name in self.blocks):
            return None
        cut = list(self._answers.values())[-1].hidden
        if cut.retains_grad:  # it would get the sum of both terms' gradients
            return None
        # Whether later blocks use what these have put in a cache is seen in the graph, where there is one.
        return None if self._sees_a_cache and not cut.requires_grad else cut

    def answers(self, start: Tensor, samples: Tensor | None) -> list[Patch]:
        """Forward methods for pass 2: no block runs, and the last one returns `start`; none after `refuse()`."""
        last = next(reversed(self.blocks), None)
        starts = {last: start}
        return [
            (vars(block), "forward", _Answering(block.forward, self._answers[name], starts.get(name), samples))
            for name, block in self.blocks.items()
        ]

    def _are_hooked(self) -> bool:
        if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
            return True
        blocks = set(self.blocks.values())
        for module in self.inside:
            forward = [h for t in (module._forward_hooks, module._forward_pre_hooks) for h in t.values()]
            if module._backward_hooks or module._backward_pre_hooks:
                return True
            if module not in blocks and any(type(hook) is not Hook for hook in forward):
                return True
        return False


class _Answering:
    """Stands in the place of a block's forward method."""

    def __init__(self, own: Any, answer: Answer, start: Tensor | None, samples: Tensor | None) -> None:
        self._own, self._answer, self._start, self._samples = own, answer, start, samples

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():  # another call (a reference, a draft) than the one that was recorded
            return self._own(*args, **kwargs)
        answer = self._answer
        answer.random_state.restore()
        output = _detached(answer.output, self._samples)
        if self._start is None:
            return output
        start = self._start if self._samples is None else _of(self._start, self._samples)
        return outputs.replace(output, answer.path, start)


def _detached(output: Any, samples: Tensor | None) -> Any:
    if isinstance(output, Tensor):
        return output.detach() if samples is None else _of(output.detach(), samples)
    if isinstance(output, tuple) and not hasattr(output, "_fields"):
        return tuple(_detached(entry, samples) for entry in output)
    return output


def _of(tensor: Tensor, samples: Tensor) -> Tensor:
    return tensor.index_select(0, samples.to(tensor.device))


def _is_plain(value: Any) -> bool:
    """Whether a block can neither keep notes for others in the value, nor has it been given a graph by them."""
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return (
        (isinstance(value, Tensor) and not (type(value) is Tensor and vars(value)))
        or isinstance(value, (type(None), bool, int, float, str, torch.dtype, torch.device))
        or outputs.is_cache(value)
    )


def _below(model: nn.Module, layers: Collection[str], sites: Collection[str] | None) -> list[str]:
    """Names of the blocks inside of which theta_aux reaches nothing, in order."""
    if not layers or not sites:
        return []
    for stack in find_stacks(model):
        number = {name: _index_in(stack, name) for name in {*layers, *sites}}
        if None in number.values():
            continue
        first = min(n for n in number.values() if n is not None)
        acts_in_first = [name for name, n in number.items() if n == first]
        behind = acts_in_first == [stack[first]] and stack[first] in sites and stack[first] in layers
        return stack[: first + behind]
    return []


def _index_in(stack: list[str], name: str) -> int | None:
    return next((i for i, block in enumerate(stack) if name == block or name.startswith(f"{block}.")), None)
