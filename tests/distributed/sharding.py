"""FSDP2 models for the checks, and counters of what they communicate and run."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed.reference import whole

KINDS = {
    "_allgather_base_": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
    "allreduce_": "all-reduce",
    "all_reduce": "all-reduce",
    "broadcast_": "broadcast",
}


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


class Collectives(TorchDispatchMode):
    """Counts the collectives in its block, by whatever function they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # it comes back with the local tensors
        namespace, name = func.name().split("::")
        if namespace in ("c10d", "_c10d_functional") and "wait" not in name and "wrap" not in name:
            self.counts[KINDS[name.split(".")[0]]] += 1
        return func(*args, **(kwargs or {}))


def same_on_all_ranks(value: int) -> bool:
    """Whether ranks have the same number."""
    both = [torch.zeros((), dtype=torch.long) for _ in range(dist.get_world_size())]
    dist.all_gather(both, torch.tensor(value))
    return len({int(v) for v in both}) == 1
