"""What one training step takes under FSDP2, from shapes alone: one rule for any model and number of ranks.

Every block is a unit, what is around them is the root's. A unit's weights are gathered before use, by one all-gather,
and freed after it; its gradients leave by one reduce-scatter. Tensors are split along their first dimension into equal
parts, so they are padded where ranks do not divide it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

STEPS = {
    "sft": "SFT",
    "steering": "LfU, steering",
    "lora": "LfU, LoRA",
    "weights": "LfU, weights",
    "steering, retained": "LfU, steering, graph retained",
    "lora, retained": "LfU, LoRA, graph retained",
}
# How often a step gathers every block, and the root: FSDP2 keeps it from a forward to the end of the next backward, or
# frees it after the forward, too. A retained step: forward, ascent backward, forward, backward through both passes.
GATHERED = {"sft": (2, 1, 2), "released": (4, 2, 4), "retained": (5, 2, 4)}


@dataclass(frozen=True)
class Sizes:
    """Bytes of a sharded model, padding included.

    Attributes:
        blocks: number of units but for the root.
        block_weights: of all blocks in the dtype of the all-gathers.
        first_block_weights: of the first block.
        root_weights: of what is around the blocks.
        block_gradients: of the blocks' trained weights in the dtype of the reduce-scatters.
        root_gradients: of the root's trained weights.
        trunk_gradients: of those before the last block: hidden states depend on no others of the root's.
        trained: number of trained tensors.
    """

    blocks: int
    block_weights: int
    first_block_weights: int
    root_weights: int
    block_gradients: int
    root_gradients: int
    trunk_gradients: int
    trained: int


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind in one step: how many, and the bytes of the whole tensors."""

    number: int
    bytes: int


def kind_of(step: str) -> str:
    """The key of `GATHERED` for a key of `STEPS`."""
    return "sft" if step == "sft" else "retained" if step.endswith(", retained") else "released"


def sizes_of(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    ranks: int,
    *,
    gathered: torch.dtype | None = None,
    reduced: torch.dtype | None = None,
) -> Sizes:
    """The sizes of a model that is not sharded yet; it may be on the meta device.

    Args:
        model: whose parameters are listed in the order of its forward.
        blocks: the units, in that order.
        ranks: over which they are spread.
        gathered: `param_dtype` of the MixedPrecisionPolicy; None: the weights' own.
        reduced: `reduce_dtype`; None: that of the gathered weights.
    """

    def size(parameter: nn.Parameter, *dtypes: torch.dtype | None) -> int:
        rows = math.ceil(parameter.shape[0] / ranks) * ranks
        dtype = next(dtype for dtype in (*dtypes, parameter.dtype) if dtype is not None)
        return rows * math.prod(parameter.shape[1:]) * dtype.itemsize

    blocks, parameters = list(blocks), list(model.parameters())
    inside = [p for block in blocks for p in block.parameters()]
    ids = {id(p) for p in inside}
    last = max(number for number, p in enumerate(parameters) if id(p) in ids)
    root = [(number, p) for number, p in enumerate(parameters) if id(p) not in ids]
    trained = [(number, size(p, reduced, gathered)) for number, p in root if p.requires_grad]
    return Sizes(
        blocks=len(blocks),
        block_weights=sum(size(p, gathered) for p in inside),
        first_block_weights=sum(size(p, gathered) for p in blocks[0].parameters()),
        root_weights=sum(size(p, gathered) for _, p in root),
        block_gradients=sum(size(p, reduced, gathered) for p in inside if p.requires_grad),
        root_gradients=sum(nbytes for _, nbytes in trained),
        trunk_gradients=sum(nbytes for number, nbytes in trained if number < last),
        trained=sum(p.requires_grad for p in parameters),
    )


def predicted_traffic(
    step: str, sizes: Sizes, *, root_is_freed: bool = False, checkpointing: bool = False
) -> dict[str, Traffic]:
    """What one step communicates, on each rank.

    Args:
        step: a key of `STEPS`.
        sizes: of the sharded model.
        root_is_freed: `reshard_after_forward=True` was given for the root; its default keeps the root gathered.
        checkpointing: activation checkpointing by transformers, which has embeddings require a gradient.
    """
    kind = kind_of(step)
    of_blocks, kept, freed = GATHERED[kind]
    of_root = freed if root_is_freed else kept
    gathers = Traffic(
        of_blocks * sizes.blocks + of_root, of_blocks * sizes.block_weights + of_root * sizes.root_weights
    )
    if kind == "retained" and not (sizes.trunk_gradients or checkpointing):
        # FSDP2 frees a unit when the gradient of its input arrives. The first block's input needs none, so the block
        # is still there when the joint backward comes to it again.
        gathers = Traffic(gathers.number - 1, gathers.bytes - sizes.first_block_weights)
    # The loss of pass 2 is one of hidden states, so what is behind the last block has no gradient there.
    of_the_root = [sizes.root_gradients, *([sizes.trunk_gradients] if kind == "released" else [])]
    backwards = len(of_the_root)
    return {
        "all-gather": gathers,
        "reduce-scatter": Traffic(
            backwards * sizes.blocks * bool(sizes.block_gradients) + sum(map(bool, of_the_root)),
            backwards * sizes.block_gradients + sum(of_the_root),
        ),
        # The lengths of gradients whose parts lie on all ranks, in float32.
        "all-reduce": Traffic(1, 4 * sizes.trained) if step == "weights" else Traffic(0, 0),
    }


def predicted_flops(step: str, sft: int, blocks: int, head_forward: int) -> int | None:
    """Operations of one step on each rank: pass 2 runs to the end of the forward, its backward through the blocks only.

    Args:
        step: a key of `STEPS`.
        sft: operations of an SFT step.
        blocks: those of the blocks' forward and backward in it.
        head_forward: those of the LM head's forward.

    Returns:
        The number; None for retained steps, whose ascent backward has no gradients of weights. Small products of
        LoRA's perturbation are left out.
    """
    return {"sft": sft, "released": sft + blocks + head_forward}.get(kind_of(step))
