"""The graft: a loss whose backward hands precomputed gradients to the leaves.

Pass 1 and pass 2 take their gradients at once and free their graphs. What the caller gets is a scalar of the right
value whose backward multiplies those gradients by the upstream gradient. So division by accumulation steps,
`GradScaler.scale`, sums with other losses and DDP's reducer see an ordinary loss.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


def graft(value: Tensor, gradients: Iterable[tuple[Tensor, Tensor | None]]) -> Tensor:
    """Scalar equal to `value` with d(result)/d(leaf) = gradient for every pair.

    Args:
        value: scalar; its own graph is ignored.
        gradients: pairs of a leaf that requires gradients, and its gradient, shaped like it, or None if it gets none.

    Returns:
        Scalar tensor, differentiable once with respect to the leaves.
    """
    pairs = [(leaf, gradient) for leaf, gradient in gradients if gradient is not None]
    result: Tensor = _Graft.apply(  # type: ignore[no-untyped-call]
        value.detach(), [gradient for _, gradient in pairs], *[leaf for leaf, _ in pairs]
    )
    return result


class _Graft(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, value: Tensor, gradients: list[Tensor], *leaves: Tensor) -> Tensor:
        # Not save_for_backward: these are neither inputs nor outputs, and no saved-tensor hook should see them.
        ctx.gradients = gradients  # type: ignore[attr-defined]
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "The loss of LfURegularizer was backpropagated twice. Its gradients are handed over once and then "
                "freed: add losses before calling backward, or call the regularizer again."
            )
        return (
            None,
            None,
            *(gradient * grad_output.to(gradient.device, gradient.dtype) for gradient in gradients),
        )
