"""Eq. 2: one normalised gradient-ascent step on the auxiliary components.

theta_aux <- theta_aux + alpha * g / ||g||_2,    g = d l_SFT / d theta_aux
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """||g||_2 over all tensors together, in at least float32, without a device synchronisation.

    Args:
        gradients: tensors of any shape, at least one.

    Returns:
        Scalar on the device of the first tensor.
    """
    device = gradients[0].device
    norms = [_norm(gradient) for gradient in gradients]
    # The norm of sharded gradients is the root of a sum over ranks, which one all-reduce takes for all of them.
    sharded: list[Any] = [norm for norm in norms if hasattr(norm, "full_tensor")]
    if sharded:
        together: Any = _norm(torch.stack(sharded))
        norms = [together.full_tensor(), *(norm for norm in norms if not hasattr(norm, "full_tensor"))]
    return _norm(torch.stack([norm.to(device) for norm in norms]))


def ascend(gradients: Sequence[Tensor], alpha: float, *, per_group: Sequence[int] | None = None) -> list[Tensor]:
    """The step alpha * g / ||g||_2; zero where the norm is zero or not finite.

    Args:
        gradients: g, one tensor per component.
        alpha: step length, the norm of what is returned.
        per_group: group number of each tensor; then every group gets a step of length alpha of its own
            (per-layer normalisation). None is one global norm, as in the paper.

    Returns:
        One tensor per gradient, same shapes.
    """
    groups = [0] * len(gradients) if per_group is None else list(per_group)
    step: list[Tensor] = [gradients[0]] * len(gradients)
    for group in dict.fromkeys(groups):
        members = [i for i, g in enumerate(groups) if g == group]
        norm = gradient_norm([gradients[i] for i in members])
        # A direction of zero or infinite length is no direction: stay put, and let the diagnostics say so.
        usable = torch.isfinite(norm) & (norm > 0)
        factor = torch.where(usable, alpha / norm, torch.zeros_like(norm))
        for i in members:
            # In at least float32, as the norm: alpha / ||g|| of a small gradient is infinite in float16.
            scaled = gradients[i].to(norm.dtype) * factor.to(gradients[i].device)
            step[i] = torch.where(usable.to(scaled.device), scaled, torch.zeros_like(scaled)).to(gradients[i].dtype)
    return step


def _norm(tensor: Tensor) -> Tensor:
    # At least float32: the square of a float16 gradient of 1e-4 is zero, and 300 squares of 3e4 sum to infinity.
    norm: Tensor = torch.linalg.vector_norm(tensor.detach(), dtype=torch.promote_types(tensor.dtype, torch.float32))
    return norm
