"""A backward that is not differentiable itself, and says so."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

SECOND_DERIVATIVES = (
    "create_graph=True asks for second derivatives, which the fused distance does not have. Give one of plain torch "
    "operations: distance=lambda clean, perturbed: (perturbed - clean).square().mean()."
)


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """`once_differentiable` that raises RuntimeError for create_graph=True.

    torch's own raises only where the upstream gradient requires a gradient. A loss that is backpropagated with a
    constant would silently get second derivatives that leave the saved tensors out.
    """
    first_only: Callable[..., Any] = once_differentiable(backward)

    @functools.wraps(backward)
    def checked(ctx: Any, *upstream: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(SECOND_DERIVATIVES)
        return first_only(ctx, *upstream)

    return checked
