"""Pass 2 replays a recorded call instead of the user's loss function, which therefore runs once per step.

The trunk is the path of modules from the model's root down to the lowest common ancestor of the chosen layers:
`LlamaModel` in `LlamaForCausalLM`. Their calls are recorded in pass 1; the deepest one that can be repeated leaves out
the LM head and the loss.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lfu_reg.hooks.early_exit import EarlyExit
from lfu_reg.hooks.gated_hook import Hook
from lfu_reg.model import peft as adapters
from lfu_reg.model.autocast import Autocast, autocast_in_force, entered_again
from lfu_reg.model.compile import entrances
from lfu_reg.model.rng import RandomState

# Arguments that hold per-position vectors without a batch dimension.
_UNBATCHED = ("cache_position", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens")


@dataclass(frozen=True)
class RecordedCall:
    """One call of one module of the trunk, with the surroundings that it depends on.

    `compiled`: it took place in a region of torch.compile.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    random_state: RandomState
    autocast: tuple[Autocast, ...]
    compiled: bool = False

    def can_be_repeated(self) -> bool:
        """Whether no input has a history in pass 1's graph, which is gone, and none is a KV cache, which grows."""
        return not any(
            value.requires_grad and not value.is_leaf if isinstance(value, Tensor) else is_cache(value)
            for value in flatten((self.args, self.kwargs))
        )

    @property
    def enters_a_context(self) -> bool:
        """Whether the call sets up more than its arguments say, until it returns."""
        return adapters.enters_a_context(self.module, self.kwargs)

    def repeat(self, samples: Tensor | None = None, batch_size: int | None = None) -> None:
        """Call the module again, with the same random draws, for some samples of the batch or for all."""
        args, kwargs = self.args, self.kwargs
        if samples is not None:
            args, kwargs = (select_samples(value, samples, batch_size) for value in (args, kwargs))
        self.random_state.restore()
        with entered_again(self.autocast):
            self.module(*args, **kwargs)


class Trunk:
    """Records the calls of the modules on the path to the chosen layers.

    Args:
        model: the attached model.
        layers: names of the chosen layers; empty for the model as a whole.
        devices: gives the devices in use.
    """

    def __init__(self, model: nn.Module, layers: Iterable[str], devices: Callable[[], list[torch.device]]) -> None:
        self._devices, self._in_use = devices, list[torch.device]()
        self._calls: dict[str, list[RecordedCall]] = {}
        self.listening = False
        self._handles: list[RemovableHandle] = []
        self.names = [name for name in _common_ancestors(list(layers)) if _is_called(model.get_submodule(name))]
        for name in self.names:
            module, hook = model.get_submodule(name), Hook(self, name)
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True))

    def remove(self) -> None:
        """Take every hook off again."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._calls = [], {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record every call in the block that runs with gradients; forget the calls recorded before."""
        self._calls, self.listening = {}, True
        self._in_use = self._devices()  # looks at every layer, so not at each call
        try:
            yield
        finally:
            self.listening = False

    def arguments(self) -> list[dict[str, Any]]:
        """Keyword arguments of the recorded calls of the outermost module that was called."""
        for name in self.names:
            if calls := self._calls.get(name):
                return [call.kwargs for call in calls]
        return []

    def forget(self) -> None:
        """Let go of the recorded inputs."""
        self._calls = {}

    def runs_once_and_bare(self) -> bool:
        """Whether each of its modules ran once, uncompiled, and set up nothing that its layers depend on."""
        return all(
            len(calls) == 1 and not calls[0].enters_a_context and not calls[0].compiled
            for calls in self._calls.values()
        )

    def replays(self, model: nn.Module) -> list[tuple[str, list[RecordedCall]]]:
        """What can be replayed, by module name, the deepest module first.

        Args:
            model: what the user trains, the attached module or a wrapper of it.
        """
        any_compiled = any(call.compiled for calls in self._calls.values() for call in calls)
        compiled = entrances(model) if any_compiled else {}  # a walk over all modules
        found: list[tuple[str, list[RecordedCall]]] = []
        for name in reversed(self.names):
            recorded = self._calls.get(name, [])
            # Only through the entrance of its region would a compiled call run as it did in pass 1.
            calls = [replace(c, module=compiled.get(c.module, c.module)) if c.compiled else c for c in recorded]
            reachable = all(not c.compiled or c.module in compiled.values() for c in calls)
            repeatable = bool(calls) and reachable and all(call.can_be_repeated() for call in calls)
            if repeatable:
                found.append((name, calls))
            if any(call.enters_a_context for call in recorded):
                found = found[-1:] if repeatable else []  # what is inside of it lacks the context
        return found

    def on_call(self, name: str, compiled: bool, module: nn.Module, args: Any, kwargs: Any) -> None:
        """What the hook on `name` does."""
        if not torch.is_grad_enabled():
            return
        self._calls.setdefault(name, []).append(
            RecordedCall(
                module,
                args,
                dict(kwargs),
                RandomState.capture(self._in_use),
                autocast_in_force(self._in_use),
                compiled,
            )
        )


def replay(calls: Iterable[RecordedCall], samples: Tensor | None = None, batch_size: int | None = None) -> None:
    """Repeat recorded calls in order, until a hook has seen enough."""
    try:
        for call in calls:
            call.repeat(samples, batch_size)
    except EarlyExit as early:
        # The frames that it left hold activations, and some of them hold the exception: empty them here and now.
        traceback.clear_frames(early.__traceback__)


def is_cache(value: Any) -> bool:
    """Whether `value` is a key/value cache, which grows when it is used."""
    return type(value).__name__.endswith("Cache")


def select_samples(value: Any, samples: Tensor, batch_size: int | None, name: str = "") -> Any:
    """`value` with every tensor in it that has one entry per sample reduced to `samples`."""
    if isinstance(value, Tensor):
        per_sample = value.dim() > 0 and len(value) == batch_size and not (value.dim() == 1 and name in _UNBATCHED)
        return value.index_select(0, samples.to(value.device)) if per_sample else value
    if isinstance(value, Mapping):
        return {key: select_samples(entry, samples, batch_size, str(key)) for key, entry in value.items()}
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)(select_samples(entry, samples, batch_size, name) for entry in value)
    return value


def _common_ancestors(layers: list[str]) -> list[str]:
    """Names of the modules that contain all the layers, the root ("") first."""
    parents = [layer.split(".")[:-1] for layer in layers]
    names = [""]
    for parts in zip(*parents, strict=False):
        if len(set(parts)) > 1:
            break
        names.append(f"{names[-1]}.{parts[0]}".lstrip("."))
    return names


def _is_called(module: nn.Module) -> bool:
    return not isinstance(module, (nn.ModuleList, nn.ModuleDict))


def flatten(value: Any) -> Iterator[Any]:
    """What is in nested mappings, tuples and lists."""
    if isinstance(value, Mapping):
        for entry in value.values():
            yield from flatten(entry)
    elif isinstance(value, (tuple, list)):
        for entry in value:
            yield from flatten(entry)
    else:
        yield value
