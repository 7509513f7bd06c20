"""Which strategy a step runs with, and what sharded parameters rule out."""

from __future__ import annotations

from lfu_reg.auxiliaries import Auxiliary
from lfu_reg.distributed.engine import Engine
from lfu_reg.step.float16 import LossScales
from lfu_reg.step.gradients import Released, ReleasedShards, Retained, Strategy

SHARDED_RELEASED = (
    "strategy='released' takes gradients of parameters, which {engine} does not give. Use strategy='auto', or shard "
    "the model with FSDP2 (torch.distributed.fsdp.fully_shard)."
)
SHARDED_WEIGHTS = (
    "auxiliary={auxiliary!r} moves the weights, which {engine} has sharded, and here it would have to do so with a "
    "retained graph. Shard the model with FSDP2 (torch.distributed.fsdp.fully_shard) and leave strategy='auto', "
    "stop_gradient='clean' and gradient synchronisation on, or use auxiliary='lora' or 'steering'."
)


def choose_strategy(
    strategy: str, stop_gradient: str, engine: Engine, auxiliary: Auxiliary, scales: LossScales
) -> Strategy:
    """The strategy of one step.

    Args:
        strategy: "auto", "released" or "retained".
        stop_gradient: which hidden states are detached.
        engine: how the model is spread over processes.
        auxiliary: theta_aux.
        scales: for float16, remembered from step to step.

    Raises:
        ValueError: where the engine's sharded parameters rule out what was asked for.
    """
    if not engine.is_sharded:
        retained = strategy == "retained" or stop_gradient != "clean"
        return Retained(scales) if retained else Released(scales)
    shards = engine.shards
    if strategy == "released" and shards is None:
        raise ValueError(SHARDED_RELEASED.format(engine=engine.name))
    # Only a retained graph brings FSDP2 to reduce what earlier backward passes have left unreduced.
    released = strategy != "retained" and stop_gradient == "clean"
    if released and shards is not None and not shards.have_pending_gradients():
        return ReleasedShards(shards)
    if auxiliary.moves_weights:
        raise ValueError(SHARDED_WEIGHTS.format(auxiliary=auxiliary, engine=engine.name))
    return Retained(may_scale=False)
