"""The twin of the Triton kernel in plain torch operations, layer by layer.

It is the CPU path of the library, the fallback where the kernel does not work, and the oracle of the kernel's tests.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from math import prod

import torch
from torch import Tensor

from lfu_reg.distances.kernels.autograd import Gradients, Implementation, States
from lfu_reg.distances.kernels.problem import Problem

# Elements per block of forward. On a CPU its temporaries stay in the cache; elsewhere they are only bounded.
_BLOCK_CPU, _BLOCK_OTHER = 1 << 18, 1 << 24


def forward(problem: Problem, clean: States, perturbed: States) -> Tensor:
    """The distances d_l [K]."""
    values = []
    for h, h_prime, index, divisor in zip(clean, perturbed, problem.index, problem.divisors, strict=True):
        # Norms of rows need no temporary for the squares, and one running sum over all of these would lose digits.
        norms = [
            torch.linalg.vector_norm(_difference(a, b, problem.dtype), dim=1)
            for a, b in _blocks(_selected(h_prime, index), _selected(h, index))
        ]
        values.append(reduce(torch.add, [norm.square_().sum() for norm in norms]) / divisor)
    return torch.stack(values)


def backward(
    problem: Problem,
    clean: States,
    perturbed: States,
    upstream: Tensor,
    want_clean: Sequence[bool],
    want_perturbed: Sequence[bool],
) -> tuple[Gradients, Gradients]:
    """The scaled differences, and their negatives."""
    to_clean: Gradients = [None] * len(clean)
    to_perturbed: Gradients = [None] * len(clean)
    for layer, (h, h_prime, index) in enumerate(zip(clean, perturbed, problem.index, strict=True)):
        if not want_clean[layer] and not want_perturbed[layer]:
            continue
        # The factor stays a tensor: reading it would make the host wait for a GPU.
        factor = upstream[layer] * (2 / problem.divisors[layer])
        difference = _difference(_selected(h_prime, index), _selected(h, index), problem.dtype)
        gradient = difference.mul_(factor)
        if want_clean[layer]:
            to_clean[layer] = _placed(-gradient, index, h)
        if want_perturbed[layer]:
            to_perturbed[layer] = _placed(gradient, index, h_prime)
    return to_clean, to_perturbed


TWIN = Implementation(forward, backward)


def _difference(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """The difference a - b, widened before it is taken: half precision may not hold it."""
    return a - b if a.dtype == b.dtype == dtype else a.to(dtype, copy=True).sub_(b)


def _blocks(a: Tensor, b: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    """Two tensors [N, hidden] in blocks of rows."""
    block = _BLOCK_CPU if a.device.type == "cpu" else _BLOCK_OTHER
    if a.numel() <= block:
        return [(a, b)]
    step = max(1, block // a.shape[1])
    return zip(torch.split(a, step), torch.split(b, step), strict=True)


def _selected(states: Tensor, index: Tensor | None) -> Tensor:
    """[..., hidden] as [positions, hidden]; the selected ones."""
    rows = states.reshape(prod(states.shape[:-1]), states.shape[-1])
    return rows if index is None else rows.index_select(0, index)


def _placed(gradient: Tensor, index: Tensor | None, like: Tensor) -> Tensor:
    """The gradient of the selected positions in that of the whole tensor."""
    gradient = gradient.to(like.dtype)
    if index is not None:
        whole = gradient.new_zeros(prod(like.shape[:-1]), like.shape[-1])
        gradient = whole.index_copy_(0, index, gradient)
    return gradient.view(like.shape)
