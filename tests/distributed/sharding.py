"""FSDP2 models for the checks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from tests.distributed.reference import whole


def blocks_of(model: Any) -> list[nn.Module]:
    """The blocks of TinyLM, of a Llama, and of a Llama with PEFT."""
    paths = ("blocks", "model.layers", "base_model.model.model.layers")
    names = {name for name, _ in model.named_modules()}
    return list(model.get_submodule(next(path for path in paths if path in names)))


def shard(model: nn.Module, **options: Any) -> Any:
    """`fully_shard` on every block and on the root."""
    for block in blocks_of(model):
        fully_shard(block, **options)
    return fully_shard(model, **options)


def gradients_of(model: nn.Module) -> dict[str, Tensor | None]:
    """Whole gradients of trainable parameters."""
    return {n: None if p.grad is None else whole(p.grad) for n, p in model.named_parameters() if p.requires_grad}


def same_on_all_ranks(value: int) -> bool:
    """Whether ranks have the same number."""
    both = [torch.zeros((), dtype=torch.long) for _ in range(dist.get_world_size())]
    dist.all_gather(both, torch.tensor(value))
    return len({int(v) for v in both}) == 1
