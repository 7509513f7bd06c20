"""The few collectives of the regularizer, over one process group or over one per dimension of a device mesh."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def all_agree(value: bool, groups: Sequence[ProcessGroup], device: torch.device) -> bool:
    """Whether `value` is true on every rank; itself where there is no group."""
    for group in groups:
        flag = torch.tensor(int(value), dtype=torch.int32, device=device)
        dist.all_reduce(flag, dist.ReduceOp.MIN, group=group)
        value = bool(flag)
    return value


def summed(tensor: Tensor, groups: Sequence[ProcessGroup]) -> Tensor:
    """The sum over ranks, written into the tensor."""
    for group in groups:
        dist.all_reduce(tensor, group=group)
    return tensor


def averaged(tensors: Mapping[str, Tensor], groups: Sequence[ProcessGroup]) -> dict[str, Tensor]:
    """The mean over ranks of every tensor, by one all-reduce per group, device and dtype."""
    kinds: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for name, tensor in tensors.items():
        kinds.setdefault((tensor.device, tensor.dtype), []).append(name)
    result = dict(tensors)
    for names in kinds.values():
        flat = torch.cat([tensors[name].flatten() for name in names])
        for group in groups:
            dist.all_reduce(flat, group=group)
            flat /= dist.get_world_size(group)
        parts = torch.split(flat, [tensors[name].numel() for name in names])
        result.update({name: part.view_as(tensors[name]) for name, part in zip(names, parts, strict=True)})
    return result


def of_first_rank(number: int, groups: Sequence[ProcessGroup], device: torch.device) -> int:
    """The first rank's value of an integer."""
    for group in reversed(groups):
        value = torch.tensor(number, dtype=torch.int64, device=device)
        dist.broadcast(value, dist.get_global_rank(group, 0), group=group)
        number = int(value)
    return number
