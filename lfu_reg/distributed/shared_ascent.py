"""`sync_perturbation=True`: all ranks ascend along the gradient that is averaged over them.

By default every rank has an undesirable self of its own, from its own samples. Here they share one: the SFT gradient
with respect to theta_aux is averaged before it is normalised, and LoRA's random A comes from the first rank's seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lfu_reg.distributed.tensor_parallel import is_distributed


def summed(tensor: Tensor, groups: Sequence[dist.ProcessGroup]) -> Tensor:
    """The sum over ranks, written into the tensor."""
    for group in groups:
        dist.all_reduce(tensor, group=group)
    return tensor


def averaged(tensors: Mapping[str, Tensor], groups: Sequence[dist.ProcessGroup]) -> dict[str, Tensor]:
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


def of_first_rank(number: int, groups: Sequence[dist.ProcessGroup], device: torch.device) -> int:
    """The first rank's value of an integer."""
    for group in reversed(groups):
        value = torch.tensor(number, dtype=torch.int64, device=device)
        dist.broadcast(value, dist.get_global_rank(group, 0), group=group)
        number = int(value)
    return number


NOT_INITIALISED = (
    "sync_perturbation=True averages the ascent gradient over ranks, but torch.distributed is not initialised. Call "
    "torch.distributed.init_process_group() first (torchrun and accelerate do), or leave sync_perturbation=False."
)
DIFFERENT_SITES = (
    "sync_perturbation=True needs every rank to run the same layers, but {where} the components of this step are not "
    "those of {others}: this rank has {number} tensors ({first}, ...). Choose layers that every batch runs, or leave "
    "sync_perturbation=False."
)
IN_PARTS = (
    "sync_perturbation=True averages g over ranks, but under tensor parallelism ranks hold different parts of it (here "
    "of {name}). Leave sync_perturbation=False: the ranks of a mesh ascend along one g anyway. Or use "
    "auxiliary='steering', whose g is whole on every rank."
)


class SharedAscent:
    """Averages g over the given ranks; where None are, over those of the engine (DDP, FSDP), else over all."""

    def __init__(self, process_group: dist.ProcessGroup | None) -> None:
        self._given = process_group
        self._groups: Sequence[dist.ProcessGroup] = ()
        self._known: int | None = None

    def begin(self, engine_groups: Sequence[dist.ProcessGroup], seed: int, device: torch.device) -> int:
        """Start a step; returns the seed that all ranks share, which is the first rank's."""
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(NOT_INITIALISED)
        fallback = [group for group in (dist.group.WORLD,) if group is not None]
        groups = [self._given] if self._given is not None else engine_groups or fallback
        if self._known is None or list(groups) != list(self._groups):
            self._groups, self._known = tuple(groups), None
            seed = of_first_rank(seed, self._groups, device)
        return seed

    def forget(self) -> None:
        """Ask the first rank for its seed again at the next step."""
        self._known = None

    def __call__(self, gradients: Mapping[str, Tensor], *, scale: float = 1.0) -> dict[str, Tensor]:
        """The mean over ranks of g, which every rank gives multiplied by a scale of its own."""
        if parts := [name for name, gradient in gradients.items() if is_distributed(gradient)]:
            raise ValueError(IN_PARTS.format(name=parts[0]))
        # Different components are noticed on every rank at the first step, and later on those ranks where they changed.
        named = repr([(name, tuple(g.shape), g.dtype) for name, g in gradients.items()])
        here = int(hashlib.blake2b(named.encode(), digest_size=7).hexdigest(), 16)
        where, others, same = "on this rank", "the first step", here == self._known
        if self._known is None:
            device = next((g.device for g in gradients.values()), torch.device("cpu"))
            bounds = torch.tensor([here, -here], dtype=torch.int64, device=device)
            for group in self._groups:
                dist.all_reduce(bounds, dist.ReduceOp.MIN, group=group)
            where, others, same = "on some ranks", "the first rank", bounds.tolist() == [here, -here]
        if not same:
            first = next(iter(gradients), "none")
            raise RuntimeError(DIFFERENT_SITES.format(where=where, others=others, number=len(gradients), first=first))
        self._known = here
        return averaged({name: g / scale for name, g in gradients.items()}, self._groups)
