"""Several small equal layers of the torch twin as one tensor: their calls would cost more than their arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from lfu_reg.distances.kernels.mse_parts import Factor, Scratch, wider
from lfu_reg.distances.kernels.mse_problem import Problem


class Stack:
    """Some consecutive layers of a problem that are of one kind; see `mse_torch.Entry`.

    The stacks are copies of the layers already, so backward keeps their difference instead of references.
    """

    def __init__(self, problem: Problem, layers: range, kind: int) -> None:
        self.layers = layers
        self.index = problem.index[kind]
        shape, self.clean_dtype, self.perturbed_dtype = problem.kinds.looks[kind]
        self.shape = (len(layers), *shape)
        self.clean: Tensor | None = _stack(problem.clean[layers.start : layers.stop], problem.grad_clean)
        self.perturbed: Tensor | None = _stack(problem.perturbed[layers.start : layers.stop], problem.grad_perturbed)
        for layer in layers:
            problem.overwrite[layer] = False

    def forward(self, _: Scratch) -> tuple[list[float], tuple[Tensor, None]]:
        """Squared sums of the layers, and their widened differences [layers, selected, hidden]."""
        h, h_prime = self.clean, self.perturbed
        assert h is not None
        assert h_prime is not None
        self.clean = self.perturbed = None
        wide = wider(h, h_prime)
        if self.index is not None:
            positions = self.shape[0], prod(self.shape[1:-1]), self.shape[-1]
            h, h_prime = (t.view(positions).index_select(1, self.index) for t in (h, h_prime))
        difference = h_prime - h if h_prime.dtype == wide else h_prime.to(wide).sub_(h)
        norms = torch.linalg.vector_norm(difference.flatten(1), dim=1)
        return [norm * norm for norm in norms.tolist()], (difference, None)

    def backward(
        self, saved: Sequence[Tensor], factors: Sequence[Factor], wanted: tuple[bool, bool], _: Scratch
    ) -> tuple[Tensor | None, Tensor | None]:
        """The differences times their factors, at their positions."""
        difference = saved[0]
        each = torch.tensor(factors, dtype=difference.dtype).view(-1, *[1] * (difference.dim() - 1))
        gradient = difference * each
        if self.index is not None:
            full = gradient.new_zeros(self.shape[0], prod(self.shape[1:-1]), self.shape[-1])
            gradient = full.index_copy_(1, self.index, gradient)
        gradient = gradient.view(self.shape)
        to_perturbed = gradient.to(self.perturbed_dtype) if wanted[0] else None
        return to_perturbed, gradient.neg().to(self.clean_dtype) if wanted[1] else None


def _stack(tensors: list[Tensor], with_graph: bool) -> Tensor:
    stacked = torch.stack(tensors)
    return stacked if with_graph or not stacked.requires_grad else stacked.detach()
