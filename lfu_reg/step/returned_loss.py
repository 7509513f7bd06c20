"""The returned loss (Eq. 6), whose backward hands precomputed gradients to the leaves.

Pass 1 and pass 2 take their gradients at once and free their graphs. What the caller gets is a scalar of the right
value whose backward multiplies those gradients by the upstream gradient. So division by accumulation steps,
`GradScaler.scale`, sums with other losses and DDP's reducer see an ordinary loss.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def returned_loss(value: Tensor, gradients: Iterable[tuple[Tensor, Tensor | None]], scale: float = 1.0) -> Tensor:
    """Scalar equal to `value` with d(result)/d(leaf) = gradient / scale for every pair."""
    # Leaves without a gradient take part all the same: DistributedDataParallel waits for each leaf of the graph.
    pairs = list(gradients)
    result: Tensor = _ReturnedLoss.apply(  # type: ignore[no-untyped-call]
        value.detach(), [gradient for _, gradient in pairs], scale, *[leaf for leaf, _ in pairs]
    )
    return result


class _ReturnedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor | None], scale: float, *leaves: Tensor) -> Tensor:
        # Not save_for_backward: these are neither inputs nor outputs, and no saved-tensor hook should see them.
        ctx.gradients, ctx.scale, ctx.dtypes = gradients, scale, [leaf.dtype for leaf in leaves]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True asks for second derivatives, and the loss of LfURegularizer is differentiable once: "
                "the graphs of its passes are gone. Use strategy='retained', which keeps them, or leave out "
                "create_graph=True."
            )
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "The loss of LfURegularizer was backpropagated twice. Its gradients are handed over once and then "
                "freed: add losses before calling backward, call the regularizer again, or use strategy='retained' "
                "with retain_graph=True."
            )
        return None, None, None, *_handed_over(gradients, grad_output, ctx.scale, ctx.dtypes)


def _handed_over(
    gradients: list[Tensor | None], grad_output: Tensor, scale: float, dtypes: list[torch.dtype]
) -> list[Tensor | None]:
    """Each gradient times `grad_output` / `scale`, in its leaf's dtype; takes them out of the list as it goes."""
    factors: dict[tuple[torch.device, torch.dtype], Tensor] = {}
    handed: list[Tensor | None] = [None] * len(gradients)
    for i, gradient in enumerate(gradients):
        if gradient is None:
            continue
        # In at least float32: the caller's scale and the own one may each be too much for float16, and meet here. In
        # bfloat16 a divisor such as 1/3 would be off by 0.2 % for all gradients alike.
        kind = gradient.device, torch.promote_types(gradient.dtype, torch.float32)
        if kind not in factors:
            factors[kind] = grad_output.to(*kind) / scale
        handed[i], gradients[i] = (gradient.to(kind[1]) * factors[kind]).to(dtypes[i]), None
    return handed
