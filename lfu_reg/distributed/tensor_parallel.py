"""Tensor parallelism (`parallelize_module`): linear maps compute in DTensors, and so does what stands beside them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed(tensor: Tensor) -> bool:
    """Whether it is a DTensor, of which every rank holds a part."""
    return hasattr(tensor, "full_tensor")


def replicated(tensor: Tensor, like: Any) -> Tensor:
    """`tensor` on every rank of the mesh of `like`, as the first one has it; itself where `like` is no DTensor."""
    if not is_distributed(like):
        return tensor
    from torch.distributed.tensor import Replicate, distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, [Replicate()] * like.device_mesh.ndim)


def whole(tensor: Any) -> Tensor:
    """All of a DTensor as a plain tensor, by an operation of the graph; every other tensor as it is."""
    result: Tensor = tensor.full_tensor() if is_distributed(tensor) else tensor
    return result


def differ_between_ranks(tensors: Sequence[Tensor], weights: Iterable[Tensor]) -> bool:
    """Whether tensors differ between the ranks that a weight is sharded over; their sums are compared."""
    distributed: list[Any] = [weight for weight in weights if is_distributed(weight)]
    sharded = next((weight for weight in distributed if any(p.is_shard() for p in weight.placements)), None)
    if sharded is None or not tensors:
        return False
    low = torch.stack([tensor.detach().sum(dtype=torch.float64) for tensor in tensors])
    high = low.clone()
    for dimension, placement in enumerate(sharded.placements):
        if placement.is_shard():
            dist.all_reduce(low, dist.ReduceOp.MIN, group=sharded.device_mesh.get_group(dimension))
            dist.all_reduce(high, dist.ReduceOp.MAX, group=sharded.device_mesh.get_group(dimension))
    return bool((high - low > 1e-3 * torch.maximum(high.abs(), low.abs())).any())
