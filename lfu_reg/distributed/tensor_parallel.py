"""Tensor parallelism (`parallelize_module`): linear maps compute in DTensors, and so does what stands beside them."""

from __future__ import annotations

from typing import Any

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
