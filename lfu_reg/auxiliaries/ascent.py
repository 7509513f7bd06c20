"""Eq. 2: one normalised gradient-ascent step on the auxiliary components.

theta_aux <- theta_aux + alpha * g / ||g||_2,    g = d l_SFT / d theta_aux
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """||g||_2 over all tensors together, a real scalar in at least float32, without a device synchronisation."""
    if not gradients:
        return torch.zeros((), dtype=torch.float32, device="cpu")
    device = gradients[0].device
    norms: list[Any] = [_norm(as_real(gradient)) for gradient in gradients]
    # The norm of sharded gradients is the root of a sum over ranks, which one all-reduce takes for all of them.
    if sharded := [norm for norm in norms if hasattr(norm, "full_tensor")]:
        together: Any = _norm(torch.stack(sharded))
        norms = [together.full_tensor(), *(norm for norm in norms if not hasattr(norm, "full_tensor"))]
    return _norm(torch.stack([norm.to(device) for norm in norms]))


def ascend(
    gradients: Sequence[Tensor], alpha: float, per_group: Sequence[int] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """||g||_2, and the step alpha * g / ||g||_2, of all or of each group; zero where the norm is zero or not finite."""
    norm = gradient_norm(gradients)
    if per_group is None:
        return norm, _normalised(gradients, alpha, norm)
    step = list(gradients)
    for group in set(per_group):
        members = [i for i, g in enumerate(per_group) if g == group]
        mine = [gradients[i] for i in members]
        for i, moved in zip(members, _normalised(mine, alpha, gradient_norm(mine)), strict=True):
            step[i] = moved
    return norm, step


def _normalised(gradients: Sequence[Tensor], alpha: float, norm: Tensor) -> list[Tensor]:
    # A direction of zero or infinite length is no direction: stay put, and let the diagnostics say so.
    usable = torch.isfinite(norm) & (norm > 0)
    factor = alpha / norm

    def moved(gradient: Tensor) -> Tensor:
        real = as_real(gradient)
        # In at least float32, as the norm: alpha / ||g|| of a small gradient is infinite in float16.
        step = real.to(norm.dtype) * factor.to(real.device)
        # Zero times infinity is NaN.
        step = torch.where(usable.to(real.device), step, torch.zeros_like(step)).to(real.dtype)
        return torch.view_as_complex(step) if gradient.is_complex() else step

    return [moved(gradient) for gradient in gradients]


def as_real(gradient: Tensor) -> Tensor:
    """A sparse gradient as a dense one, and a complex one as its real and imaginary parts, [..., 2]."""
    gradient = gradient.to_dense() if gradient.is_sparse else gradient
    return torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient


def _norm(tensor: Tensor) -> Tensor:
    # The square of a float16 gradient of 1e-4 is zero, and 300 squares of 3e4 sum to infinity.
    norm: Tensor = torch.linalg.vector_norm(tensor.detach(), dtype=torch.promote_types(tensor.dtype, torch.float32))
    return norm
