"""One call for many tensors: adapters have hundreds of weights, and a call for each costs more than its arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

# Elements that one call takes. Its results exist beside what they are made from, so this bounds the memory for both.
PORTION = 2**24


def portions(tensors: Sequence[Tensor | None]) -> Iterator[list[int]]:
    """Positions of tensors that one call can take: dense ones of a device and dtype; others come alone."""
    collected: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    sizes: dict[tuple[torch.device, torch.dtype], int] = {}
    for i, tensor in enumerate(tensors):
        if tensor is None:
            continue
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
            yield [i]
            continue
        kind, size = (tensor.device, tensor.dtype), tensor.numel()
        if sizes.get(kind, 0) + size > PORTION and kind in collected:
            yield collected.pop(kind)
            sizes[kind] = 0
        collected.setdefault(kind, []).append(i)
        sizes[kind] = sizes.get(kind, 0) + size
    yield from collected.values()


def multiplied(tensors: list[Tensor], factor: Tensor) -> list[Tensor]:
    """Each times a scalar on the same device; those of one portion, or a single one."""
    return [tensors[0] * factor] if len(tensors) == 1 else list(torch._foreach_mul(tensors, factor))


def zero_unless(condition: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Each as it is where the scalar `condition` holds, else zeros, whatever is in it; writes to those of a portion."""
    if len(tensors) == 1:
        return [torch.where(condition, tensors[0], torch.zeros_like(tensors[0]))]
    # Zero times NaN is NaN; but not among the whole numbers that the same bits stand for.
    whole = {4: torch.int32, 8: torch.int64}[tensors[0].element_size()]
    torch._foreach_mul_([tensor.view(whole) for tensor in tensors], condition.to(whole))
    return tensors
