"""Which engine spreads the model over processes, and what it allows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn

from lfu_reg.distributed.ddp import wrappers_of
from lfu_reg.distributed.fsdp2 import Shards, units_among

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# DTensors that FSDP2 has not made: they are leaves of the loss's graph.
TENSOR_PARALLEL = "tensor parallelism"
DEEPSPEED = (
    "DeepSpeed's engine takes the gradient that LfU's ascent takes for your backward pass, and reduces too early. Give "
    "the module inside: loss = reg(engine.module, batch, sft_loss_fn); engine.backward(loss); engine.step()."
)


@dataclass(frozen=True)
class Engine:
    """How a model is spread over processes.

    Attributes:
        name: "FSDP2", "FSDP1", "ZeRO-3", "tensor parallelism", "DDP", or "none".
        shards: of FSDP2.
        units: FSDP modules, the outermost first.
        groups: the ranks that the batches are spread over, one group per dimension of the mesh.
        in_lockstep: whether forward passes communicate, so that every rank has to run the same number of them.
    """

    name: str = "none"
    shards: Shards | None = None
    units: tuple[nn.Module, ...] = ()
    groups: tuple[ProcessGroup, ...] = ()
    in_lockstep: bool = False

    @property
    def is_sharded(self) -> bool:
        """Whether parameters are sharded, so that forward passes gather or reduce."""
        return self.name not in ("none", "DDP")

    def can_start_at(self, module: nn.Module) -> bool:
        """Whether a forward may begin at `module`: not inside of an FSDP unit, which gathers weights at its entry."""
        return not any(module is not unit and any(m is module for m in unit.modules()) for unit in self.units)


def engine_of(model: nn.Module, attached: nn.Module, layers: Iterable[nn.Module]) -> Engine:
    """The engine of a model.

    Args:
        model: what the user trains, the attached module or a wrapper of it.
        attached: the attached module.
        layers: the chosen layers.

    Raises:
        ValueError: for a DeepSpeed engine.
    """
    for module in model.modules():  # the wrappers come first
        if any(kind.__name__ == "DeepSpeedEngine" for kind in type(module).__mro__):
            raise ValueError(DEEPSPEED)
        if module is attached:
            break
    if not (dist.is_available() and dist.is_initialized()):
        return Engine()
    modules = list(model.modules())  # one walk for all that follows: it is taken at every step
    old = tuple(module for module in modules if type(module).__name__ == "FullyShardedDataParallel")
    if old:
        groups = (getattr(old[0], "process_group", dist.group.WORLD),)
        return Engine("FSDP1", units=old, groups=_given(groups), in_lockstep=True)
    units = units_among(modules)
    if units:
        shards = Shards(units, layers)
        return Engine("FSDP2", shards, tuple(units), _mesh_groups(shards), in_lockstep=True)
    for parameter in (p for module in modules for p in module._parameters.values()):
        if hasattr(parameter, "ds_id"):
            return Engine("ZeRO-3", groups=_given([dist.group.WORLD]), in_lockstep=True)
        if type(parameter).__name__ == "DTensor":
            return Engine(TENSOR_PARALLEL, in_lockstep=True)
    wrappers = wrappers_of(model, attached)
    if wrappers:
        ddp = wrappers[0]
        return Engine("DDP", groups=(ddp.process_group,), in_lockstep=_forward_communicates(ddp))
    return Engine()


def _forward_communicates(ddp: Any) -> bool:
    if getattr(getattr(ddp, "_join_config", None), "enable", False):
        return False  # ranks that have run out of batches take no part in collectives of ours
    broadcasts = ddp.broadcast_buffers and any(True for _ in ddp.module.buffers())
    return broadcasts or any(isinstance(module, nn.SyncBatchNorm) for module in ddp.modules())


def _mesh_groups(shards: Shards) -> tuple[ProcessGroup, ...]:
    meshes = shards.meshes()
    return tuple(meshes[0].get_group(dimension) for dimension in range(meshes[0].ndim)) if meshes else ()


def _given(groups: Iterable[ProcessGroup | None]) -> tuple[ProcessGroup, ...]:
    return tuple(group for group in groups if group is not None)
