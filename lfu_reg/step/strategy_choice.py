"""Which strategy a step runs with, and what sharded parameters rule out."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lfu_reg.auxiliaries import Auxiliary
from lfu_reg.distributed.engine import TENSOR_PARALLEL, Engine
from lfu_reg.step.float16 import LossScales
from lfu_reg.step.gradients import Retained, Strategy
from lfu_reg.step.one_backward import OneBackward
from lfu_reg.step.released import Released, ReleasedShards
from lfu_reg.step.settings import Settings

SHARDED_RELEASED = (
    "strategy='released' is not available under {engine}. Use strategy='auto', or shard the model with FSDP2 "
    "(torch.distributed.fsdp.fully_shard)."
)
SHARDED_WEIGHTS = (
    "auxiliary={auxiliary!r} moves the weights, which {engine} has sharded, and here their gradient cannot be taken in "
    "the step. Shard the model with FSDP2 (torch.distributed.fsdp.fully_shard) and leave strategy='auto', "
    "stop_gradient='clean' and gradient synchronisation on, or use auxiliary='lora' or 'steering'."
)


def choose_strategy(
    settings: Settings, engine: Engine, auxiliary: Auxiliary, scales: LossScales, trained: Sequence[Tensor]
) -> Strategy:
    """The strategy of one step; raises where the engine's sharded parameters rule out what was asked for."""
    if settings.is_one_backward:
        if auxiliary.moves_weights and engine.is_sharded:
            raise ValueError(SHARDED_WEIGHTS.format(auxiliary=auxiliary, engine=engine.name))
        return OneBackward(auxiliary, scales, () if engine.is_sharded else trained)
    retained = settings.strategy == "retained" or settings.stop_gradient != "clean"
    if not engine.is_sharded:
        return Retained(auxiliary, scales, trained) if retained else Released(auxiliary, scales, trained)
    shards = engine.shards
    if settings.strategy == "released" and shards is None:
        raise ValueError(SHARDED_RELEASED.format(engine=engine.name))
    # Only a retained graph brings FSDP2 to reduce what earlier backward passes have left unreduced.
    if not retained and shards is not None and not shards.have_pending_gradients():
        return ReleasedShards(auxiliary, scales, shards)
    parallel = engine.name == TENSOR_PARALLEL
    if auxiliary.moves_weights and not parallel:
        raise ValueError(SHARDED_WEIGHTS.format(auxiliary=auxiliary, engine=engine.name))
    strategy = Retained(auxiliary, scales, trained if parallel else ())
    strategy.scales_float16 = False  # ranks in lockstep may not repeat a backward
    return strategy
