"""Pass 2 leaves the forward after the last layer whose hidden state is wanted; the rest would be thrown away."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from lfu_reg.distributed.fsdp2 import units_of
from lfu_reg.hooks.forward_pass import Pass
from lfu_reg.hooks.gated_hook import Hook


class EarlyExit(BaseException):
    """Leaves the forward pass after the last hidden state that is wanted. Not an Exception: no model may swallow it."""


class EarlyExits:
    """Raises `EarlyExit` at the end of the layer whose hidden state was the last one wanted.

    Attributes:
        listening: whether the running pass may be left early.
        running: the running pass.
    """

    def __init__(self) -> None:
        self.listening = False
        self.running: Pass | None = None

    def on_call(self, name: str, compiled: bool, *call: Any) -> None:
        """What the hook on layer `name` does."""
        this = self.running
        # Not while the pass is repeated for its backward (activation checkpointing).
        if this is not None and this.recording and this.stop_after is not None and len(this.states) >= this.stop_after:
            raise EarlyExit


def early_exit_is_safe(model: nn.Module) -> bool:
    """Whether a forward may be left by an exception: sharded engines keep track of its end."""
    if units_of(model) or any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        return False
    return not any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def way_out(start: nn.Module, last: nn.Module) -> list[nn.Module]:
    """The modules that an exit from `last` leaves if the forward begins at `start`: both, and those between."""
    return [module for module in start.modules() if any(inner is last for inner in module.modules())]


def hooks_stay_paired(way: Iterable[nn.Module]) -> bool:
    """Whether an exit skips no forward hook but ours: its pre-hook has run, and what that opened would stay open.

    Where the forward is left, hooks registered before our own have run, too. `always_call=True` helps no hook: torch
    keeps that promise for an `Exception` only.

    Args:
        way: see `way_out`.
    """
    if torch_module._global_forward_hooks:
        return False
    return all(isinstance(hook, Hook) for module in way for hook in _after_the_exit(module))


def _after_the_exit(module: nn.Module) -> list[object]:
    hooks: list[object] = list(module._forward_hooks.values())
    exits = (i for i, hook in enumerate(hooks) if isinstance(hook, Hook) and isinstance(hook.listener, EarlyExits))
    return hooks[1 + max(exits, default=-1) :]
