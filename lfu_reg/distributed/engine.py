"""Which engine spreads the model over processes, and what it allows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import nn

from lfu_reg.distributed.ddp import wrappers_of
from lfu_reg.distributed.fsdp2 import Shards

# DTensors that FSDP2 has not made: they are leaves of the loss's graph.
TENSOR_PARALLEL = "tensor parallelism"
DEEPSPEED = (
    "DeepSpeed's engine takes the gradient that LfU's ascent takes for your backward pass, and reduces too early. Give "
    "the module inside: loss = reg(engine.module, batch, sft_loss_fn); engine.backward(loss); engine.step()."
)


@dataclass(frozen=True)
class Engine:
    """How a model is spread over processes."""

    name: str = "none"  # or "FSDP2", "FSDP1", "ZeRO-3", "tensor parallelism", "DDP"
    shards: Shards | None = None  # of FSDP2
    groups: tuple[dist.ProcessGroup, ...] = ()  # the ranks that batches are spread over, one per dimension of the mesh
    in_lockstep: bool = False  # forward passes communicate, so every rank has to run the same number of them
    may_run_out: bool = False  # of batches, under DDP's `join`: then it takes no part in collectives of ours

    @property
    def is_sharded(self) -> bool:
        """Whether parameters are sharded, so that forward passes gather or reduce."""
        return self.name not in ("none", "DDP")


def engine_of(model: nn.Module, attached: nn.Module, layers: Iterable[nn.Module]) -> Engine:
    """The engine of what the user trains: the attached module, or a wrapper of it."""
    for module in model.modules():  # the wrappers come first
        if any(kind.__name__ == "DeepSpeedEngine" for kind in type(module).__mro__):
            raise ValueError(DEEPSPEED)
        if module is attached:
            break
    if not (dist.is_available() and dist.is_initialized()):
        return Engine()
    from torch.distributed.fsdp import FSDPModule

    everybody = dist.group.WORLD
    assert everybody is not None
    modules = list(model.modules())  # one walk for all that follows: it is taken at every step
    for module in modules:
        if type(module).__name__ == "FullyShardedDataParallel":
            return Engine("FSDP1", groups=(getattr(module, "process_group", everybody),), in_lockstep=True)
    if units := [module for module in modules if isinstance(module, FSDPModule)]:
        shards = Shards(units, layers)
        return Engine("FSDP2", shards, shards.process_groups(), in_lockstep=True)
    for parameter in (p for module in modules for p in module._parameters.values()):
        if hasattr(parameter, "ds_id"):
            return Engine("ZeRO-3", groups=(everybody,), in_lockstep=True)
        if type(parameter).__name__ == "DTensor":
            return Engine(TENSOR_PARALLEL, in_lockstep=True)
    for ddp in wrappers_of(model, attached):
        joined = bool(getattr(getattr(ddp, "_join_config", None), "enable", False))
        lockstep = not joined and _forward_communicates(ddp)
        return Engine("DDP", groups=(ddp.process_group,), in_lockstep=lockstep, may_run_out=joined)
    return Engine()


def _forward_communicates(ddp: Any) -> bool:
    broadcasts = ddp.broadcast_buffers and any(True for _ in ddp.module.buffers())
    return broadcasts or any(isinstance(module, nn.SyncBatchNorm) for module in ddp.modules())
