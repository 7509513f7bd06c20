"""DistributedDataParallel: settings and calls under which gradients would silently stay on their rank.

DDP synchronises what a backward pass accumulates, if its own forward has run before. So the loss has to come out of the
wrapper; where it comes out of `wrapper.module`, nothing is synchronised and nothing is said.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lfu_reg.model.patching import patched

STATIC_GRAPH = (
    "DistributedDataParallel(static_graph=True) does not synchronise gradients when a gradient is taken through its "
    "output before loss.backward(), as LfU's ascent does: every rank would train on its own. Wrap the model with "
    "static_graph=False. If that was for reentrant activation checkpointing, use use_reentrant=False instead; if for "
    "unused parameters, find_unused_parameters=True."
)
BYPASSED = (
    "A DistributedDataParallel wrapper holds this model, but sft_loss_fn ran the model inside of it (ddp.module), so "
    "gradients would stay on their rank without being averaged. Pass the wrapper, loss = reg(ddp, batch, sft_loss_fn), "
    "and call the model that sft_loss_fn is given. To accumulate without communication, use `with ddp.no_sync():`. If "
    "the wrapper is not in use any more, delete it."
)


class Wrappers:
    """The DDP wrappers of one attached model, once seen."""

    def __init__(self) -> None:
        self._known: weakref.WeakSet[DistributedDataParallel] = weakref.WeakSet()
        self._searched = False

    @contextmanager
    def must_run(self, model: nn.Module, attached: nn.Module, ran: Callable[[], bool]) -> Iterator[None]:
        """Raise for a static graph, and if the attached module ran in the block, but not through its wrapper."""
        if not (dist.is_available() and dist.is_initialized()):
            yield
            return
        self._known.update(wrappers_of(model, attached))
        if not self._known and not self._searched and dist.get_world_size() > 1:
            # Once: it takes some 0.1 s. The wrapper knows the model, but the model does not know the wrapper.
            self._searched = True
            # By type(), which runs no code of the objects looked at.
            everywhere = [thing for thing in gc.get_objects() if issubclass(type(thing), DistributedDataParallel)]
            self._known.update(w for w in everywhere if any(module is attached for module in w.modules()))
        if any(wrapper.static_graph for wrapper in self._known):
            raise ValueError(STATIC_GRAPH)
        waiting = [wrapper for wrapper in self._known if _will_synchronise(wrapper)]
        for wrapper in waiting:
            # DDP's forward sets this flag to True; a number says the same, and that it has not done so yet.
            wrapper.require_forward_param_sync = int(wrapper.require_forward_param_sync)  # type: ignore[assignment]
        try:
            yield
            if waiting and ran() and not any(wrapper.require_forward_param_sync is True for wrapper in waiting):
                raise ValueError(BYPASSED)
        finally:
            for wrapper in waiting:
                wrapper.require_forward_param_sync = bool(wrapper.require_forward_param_sync)


def not_synchronising(model: nn.Module, attached: nn.Module) -> AbstractContextManager[None]:
    """Let the wrappers run their forward in the block without any preparation or communication for a backward."""
    wrappers = [vars(wrapper) for wrapper in wrappers_of(model, attached)]
    names = ("require_backward_grad_sync", "require_forward_param_sync")
    # Within `join` each forward is one that ranks without batches answer.
    joins = [(held, "_join_config", held["_join_config"]._replace(enable=False)) for held in wrappers]
    return patched([*joins, *((held, name, False) for held in wrappers for name in names)])


def wrappers_of(model: nn.Module, attached: nn.Module) -> list[DistributedDataParallel]:
    """The DDP wrappers around the attached module within `model`, the outermost first."""
    found = []
    for module in model.modules():  # the wrappers come first
        if isinstance(module, DistributedDataParallel):
            found.append(module)
        if module is attached:
            break
    return found


def _will_synchronise(wrapper: DistributedDataParallel) -> bool:
    # The other two are modes in which its forward has nothing to prepare.
    elsewhere = any(getattr(wrapper, name, False) for name in ("_use_python_reducer", "_delay_all_reduce_all_params"))
    return bool(wrapper.require_backward_grad_sync) and not elsewhere
