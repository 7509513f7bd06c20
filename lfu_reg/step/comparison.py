"""The gradients of l_SFT and of l_cons side by side: how long each is, and how far they point the same way."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lfu_reg.auxiliaries.ascent import as_real, gradient_norm
from lfu_reg.distributed.tensor_parallel import is_distributed, whole


@dataclass(frozen=True)
class Comparison:
    """Two gradients over the same parameters."""

    sft: Tensor  # norms, scalars in at least float32
    consistency: Tensor
    product: Tensor  # inner product, scalar


def compare(
    sft: Iterable[tuple[Tensor, Tensor | None]],
    consistency: Iterable[tuple[Tensor, Tensor | None]],
    trained: Collection[Tensor],
    *,
    scales: tuple[float, float] = (1.0, 1.0),
    with_product: bool,
) -> Comparison | None:
    """Compare them over the trained parameters (all leaves where there are none); None where neither reaches one."""
    counts = {id(parameter) for parameter in trained}
    first, second = (
        {id(leaf): g for leaf, g in pairs if g is not None and (not counts or id(leaf) in counts)}
        for pairs in (sft, consistency)
    )
    if not first and not second:
        return None
    norms = [gradient_norm([*found.values()]) / scale for found, scale in zip((first, second), scales, strict=True)]
    product = norms[0].new_zeros(())
    products = [_product(first[key], second[key]) for key in first if key in second] if with_product else []
    # One all-reduce for all that is sharded.
    for group in ([p for p in products if is_distributed(p)], [p for p in products if not is_distributed(p)]):
        if group:
            product = product + whole(sum(group[1:], group[0])).to(product)
    return Comparison(norms[0], norms[1], product / (scales[0] * scales[1]))


def _product(first: Tensor, second: Tensor) -> Tensor:
    first, second = (as_real(gradient) for gradient in (first, second))
    dtype = torch.promote_types(first.dtype, torch.float32)
    product: Tensor = (first.to(dtype) * second.to(dtype)).sum()
    return product
