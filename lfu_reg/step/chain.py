"""The layers of a stack called one after the other, as pass 1 called them: a shorter way through pass 2.

h_l ──► layer l+1 ──► h_{l+1} ──► layer l+2 ──► ...

Where each layer is handed the very tensor that the layer before it returned, and else nothing that was made since the
first one began, the model's own loop adds nothing to the layers. Pass 2 can then begin where theta_aux first acts: see
`prefix.py` for what that saves, and `replays.py` for how it is checked that this is the same forward.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lfu_reg.hooks.gated_hook import Hook
from lfu_reg.hooks.model_hooks import ModelHooks
from lfu_reg.model import outputs
from lfu_reg.model.autocast import Autocast, autocast_in_force, entered_again
from lfu_reg.model.layers import find_stacks
from lfu_reg.model.rng import Draws, RandomState
from lfu_reg.step.made_before import MadeBefore
from lfu_reg.step.trunk import flatten, is_cache, select_samples

# Private, and not in torch 2.6: there, every layer would look as if nothing was around it, so nothing is recorded.
_innermost_hooks: Callable[[bool], object] | None = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", None
)


@dataclass(frozen=True)
class Link:
    """One layer's call in pass 1, without the hidden state that it was called with.

    Attributes:
        module: the layer.
        args, kwargs: with `slot` empty.
        slot: position or keyword of the hidden state.
        autocast: in force at the call.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    slot: int | str
    autocast: tuple[Autocast, ...]

    def call(self, hidden: Tensor, samples: Tensor | None, batch_size: int) -> Tensor:
        """The layer's hidden state for another one that comes in, for some samples of the batch or for all."""
        args, kwargs = self.args, self.kwargs
        if samples is not None:
            args, kwargs = (select_samples(value, samples, batch_size) for value in (args, kwargs))
        if isinstance(self.slot, int):
            args = (*args[: self.slot], hidden, *args[self.slot + 1 :])
        else:
            kwargs = {**kwargs, self.slot: hidden}
        with entered_again(self.autocast):
            result = _hidden_in(self.module(*args, **kwargs))
        assert result is not None  # as in pass 1
        return result


class Chain:
    """Records the calls of the layers from the first one that theta_aux acts in or behind to the last one chosen.

    Args:
        model: the attached model.
        layers: names of the chosen layers.
        sites: names of the modules at whose outputs the auxiliary acts; None where it acts elsewhere.
        devices: gives the devices in use.

    Attributes:
        names: of the layers that are hooked here; empty where there is no layer to save.
        cut: what enters the chain, in the graph of pass 1: the output of `behind`, or the first link's input.
        behind: the layer at whose output theta_aux first acts, if it acts at nothing before that.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Collection[str],
        sites: Collection[str] | None,
        devices: Callable[[], list[torch.device]],
    ) -> None:
        self._devices = devices
        self.behind, self._expected, self.names = _span(model, layers, sites)
        self._made_before = MadeBefore()
        self.listening, self._handles = False, list[RemovableHandle]()
        # Blocks of one class are to have the same hooks, whatever they do: see `ModelHooks`.
        for name in self.names:
            module, hook = model.get_submodule(name), Hook(self, name)
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True))
            self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
        self.forget()

    def forget(self) -> None:
        """Let go of what was recorded."""
        self.cut: Tensor | None = None
        self._last: Tensor | None = None
        self._links: list[Link] = []
        self._entered: object = None
        self._entrance: tuple[nn.Module, Any, Any] | None = None
        self._random_state: RandomState | None = None
        self._mark: object = None  # of the last hidden state, as it left its layer
        self._draws: Draws | None = None
        self._made_before.forget()
        self._broken = False
        self._saving: object = None
        self._in_use: list[torch.device] = []

    def remove(self) -> None:
        """Take every hook off again."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.names = [], ()
        self.forget()

    @contextmanager
    def recording(self, wanted: bool) -> Iterator[None]:
        """Record the calls in the block, if that is wanted; forget what was recorded before."""
        self.forget()
        self.listening = wanted and bool(self.names) and _innermost_hooks is not None
        self._saving = _saved_tensors_hooks()
        try:
            yield
        finally:
            self.listening, self._last, self._draws = False, None, None

    def on_call(self, name: str, compiled: bool, module: nn.Module, args: Any, kwargs: Any, *output: Any) -> None:
        """What the hooks on layer `name` do, before its call and after it."""
        if not torch.is_grad_enabled() or self._broken:
            return
        if compiled:
            self._broken = True
        elif output:
            self._ends(name, module, args, kwargs, output[0])
        elif name in self._expected:
            self._begins(name, module, args, kwargs)

    def _begins(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        number = len(self._links)
        if name not in self._expected[number : number + 1] or _is_wrapped(module, self._saving):
            self._broken = True
            return
        if not self._links and self.behind is None:
            self._enter(_first_tensor(args, kwargs), args, kwargs, taps=0)
        slot = _slot_of(self._last, args, kwargs)
        # The model's loop has not touched what the layer before returned, and has drawn no random number.
        if self._last is None or _mark_of(self._last) != self._mark or self._draws != Draws():
            slot = None
        # A cache, which grows when it is used, was empty when the model's forward began.
        args = tuple(None if i == slot or is_cache(value) else value for i, value in enumerate(args))
        kwargs = {key: None if key == slot or is_cache(value) else value for key, value in kwargs.items()}
        if slot is None or not self._made_before.holds(number, flatten((args, kwargs))):
            self._broken = True
            return
        self._links.append(Link(module, args, kwargs, slot, autocast_in_force(self._in_use)))

    def _ends(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        hidden = _hidden_in(output)
        if name == self.behind:
            if self._entrance is not None or not _only_ours(module) or _is_wrapped(module, self._saving):
                self._broken = True
                return
            self._entrance = (module, args, kwargs)
            self._enter(hidden, args, kwargs, taps=1)
        elif name in self._expected:
            self._leaves(hidden)

    def _enter(self, cut: Tensor | None, args: Any, kwargs: Any, *, taps: int) -> None:
        self._in_use = self._devices()
        self.cut = cut
        self._random_state = RandomState.capture(self._in_use)
        self._leaves(cut)
        self._entered = self._mark
        # What was made later might come from a hidden state, and what is in the graph from the prefix.
        tensors = [value for value in flatten((args, kwargs)) if isinstance(value, Tensor)]
        self._made_before.begin(t for t in tensors if t is not cut and (t.is_leaf or not t.requires_grad))
        # A hook on the cut would see the gradient of l_SFT, and then the sum of both.
        self._broken |= cut is not None and len(cut._backward_hooks or ()) > taps

    def _leaves(self, hidden: Tensor | None) -> None:
        self._last, self._draws = hidden, Draws()
        self._mark = None if hidden is None else _mark_of(hidden)

    def is_whole(self) -> bool:
        """Whether every layer ran once, in order, each on what the layer before it returned, and nothing made since."""
        untouched = self.cut is not None and _mark_of(self.cut) == self._entered
        as_recorded = untouched and self._made_before.are_unwritten()
        return as_recorded and not self._broken and len(self._links) == len(self._expected)

    def run(self, hooks: ModelHooks, start: Tensor, samples: Tensor | None, batch_size: int) -> None:
        """Call the layers again from another tensor on, with the random draws of pass 1.

        Args:
            hooks: of the regularizer; they see the output of `behind` although that layer does not run.
            start: in the place of `cut`.
            samples: the samples of the batch to run on, None for all.
            batch_size: of pass 1.
        """
        assert self._random_state is not None
        hidden = start if samples is None else start.index_select(0, samples.to(start.device))
        self._random_state.restore()
        if self.behind is not None and self._entrance is not None:
            changed = hooks.on_call(self.behind, False, *self._entrance, hidden)
            hidden = hidden if changed is None else changed
        for link in self._links:
            hidden = link.call(hidden, samples, batch_size)


def _span(
    model: nn.Module, layers: Collection[str], sites: Collection[str] | None
) -> tuple[str | None, tuple[str, ...], tuple[str, ...]]:
    """(`behind`, names of the links, names of the whole stack); no names where no layer would be saved."""
    nothing: tuple[None, tuple[str, ...], tuple[str, ...]] = (None, (), ())
    if not layers or not sites:
        return nothing
    for stack in find_stacks(model):
        block_of = {name: _index_in(stack, name) for name in {*layers, *sites}}
        if None in block_of.values():
            continue
        numbers = {name: number for name, number in block_of.items() if number is not None}
        first, last = min(numbers.values()), max(numbers[name] for name in layers)
        acts_in_first = [name for name, number in numbers.items() if number == first]
        behind = stack[first] if acts_in_first == [stack[first]] and stack[first] in sites else None
        links = stack[first + (behind is not None) : last + 1]
        return (behind, tuple(links), tuple(stack)) if first or behind else nothing
    return nothing


def _index_in(stack: list[str], name: str) -> int | None:
    return next((i for i, block in enumerate(stack) if name == block or name.startswith(f"{block}.")), None)


def _mark_of(hidden: Tensor) -> object:
    """What tells whether a tensor was written to, detached in place, or given a hook."""
    return hidden._version, hidden.grad_fn, hidden.requires_grad, len(hidden._backward_hooks or ()), hidden.retains_grad


def _hidden_in(output: Any) -> Tensor | None:
    path = outputs.locate(output)
    return None if path is None else outputs.get(output, path)


def _first_tensor(args: Any, kwargs: Mapping[str, Any]) -> Tensor | None:
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point()]
    return next((t for t in tensors if t.requires_grad), tensors[0] if tensors else None)


def _slot_of(hidden: Tensor | None, args: Iterable[Any], kwargs: Mapping[str, Any]) -> int | str | None:
    if hidden is None:
        return None
    slots: list[int | str] = [i for i, value in enumerate(args) if value is hidden]
    slots += [key for key, value in kwargs.items() if value is hidden]
    return slots[0] if len(slots) == 1 else None


def _only_ours(module: nn.Module) -> bool:
    """Whether nobody else's hook may change the layer's output after it was seen. Global hooks come before ours."""
    return all(isinstance(hook, Hook) for hook in module._forward_hooks.values())


def _is_wrapped(module: nn.Module, outside: object) -> bool:
    """Whether the caller has put the layer's call into an activation checkpoint, which a call of ours would lack."""
    if _saved_tensors_hooks() == outside:
        return False
    enters_it_itself = type(module).__call__ is not nn.Module.__call__ and module.training
    return not (enters_it_itself and getattr(module, "gradient_checkpointing", False))


def _saved_tensors_hooks() -> object:
    """The innermost ones in force."""
    return None if _innermost_hooks is None else _innermost_hooks(False)
