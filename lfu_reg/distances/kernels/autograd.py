"""The autograd function around an implementation: what is saved, which gradients are wanted, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lfu_reg.distances.kernels.problem import Problem

States: TypeAlias = Sequence[Tensor]
Gradients: TypeAlias = list[Tensor | None]

SECOND_DERIVATIVES = (
    "create_graph=True asks for second derivatives, which the fused distance does not have. Give one of plain torch "
    "operations: distance=lambda clean, perturbed: (perturbed - clean).square().mean()."
)


@dataclass(frozen=True, slots=True)
class Implementation:
    """A way to compute the distances of a problem.

    Attributes:
        forward: (problem, clean, perturbed) -> the distances d_l [K].
        backward: (problem, clean, perturbed, gradient of the distances [K], whether each clean tensor gets a gradient,
            whether each perturbed one does) -> the gradients of the K clean and of the K perturbed tensors.
    """

    forward: Callable[[Problem, States, States], Tensor]
    backward: Callable[[Problem, States, States, Tensor, Sequence[bool], Sequence[bool]], tuple[Gradients, Gradients]]


def apply(problem: Problem, implementation: Implementation, clean: States, perturbed: States) -> Tensor:
    """The distances d_l [K] of a checked problem, differentiable once."""
    per_layer: Tensor = _MSEOverLayers.apply(problem, implementation, *clean, *perturbed)  # type: ignore[no-untyped-call]
    return per_layer


class _MSEOverLayers(torch.autograd.Function):
    """d_l of K layers; the gradient is 2/divisor_l (h' - h) to h', and its negative to h.

    Only references to the states are saved; the difference is computed again in backward.
    """

    @staticmethod
    def forward(ctx: Any, problem: Problem, implementation: Implementation, *states: Tensor) -> Tensor:
        """One look at every selected position of every layer."""
        ctx.save_for_backward(*states)
        ctx.problem, ctx.implementation = problem, implementation
        count = len(problem.layers)
        return implementation.forward(problem, states[:count], states[count:])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Scaled differences, zero at positions that were not selected."""
        # once_differentiable would not notice a constant upstream gradient, and leave the saved tensors out silently.
        if torch.is_grad_enabled():
            raise RuntimeError(SECOND_DERIVATIVES)
        states, wanted = ctx.saved_tensors, ctx.needs_input_grad[2:]
        count = len(ctx.problem.layers)
        to_clean, to_perturbed = ctx.implementation.backward(
            ctx.problem, states[:count], states[count:], upstream, wanted[:count], wanted[count:]
        )
        return None, None, *to_clean, *to_perturbed
