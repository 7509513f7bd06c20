"""The plain way to compute the loss, one layer at a time, in whatever dtype the tensors have."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from lfu_reg.distances.kernels.entry import mse_over_layers


def plain(
    clean: Sequence[Tensor],
    perturbed: Sequence[Tensor],
    index: Any = None,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    values = []
    for layer, (h, h_prime) in enumerate(zip(clean, perturbed, strict=True)):
        h, h_prime = (t.reshape(prod(t.shape[:-1]), t.shape[-1]) for t in (h, h_prime))
        chosen = index if index is None or isinstance(index, Tensor) else index[layer]
        if chosen is not None:
            h, h_prime = h[chosen], h_prime[chosen]
        divisor = h.numel() if reduction == "mean" else len(h)
        values.append((h_prime - h).square().sum() / max(1, divisor))
    return sum(values, torch.zeros(())) / len(values), torch.stack([v.detach().double() for v in values])


def make(
    shapes: Sequence[Sequence[int]],
    dtype: torch.dtype = torch.float32,
    other: torch.dtype | None = None,
    device: str = "cpu",
    spread: float = 0.1,
) -> tuple[list[Tensor], list[Tensor]]:
    """Clean states of `dtype` and perturbed ones of `other`, both leaves that require a gradient."""
    clean = [torch.randn(*shape) for shape in shapes]
    perturbed = [h + spread * torch.randn(h.shape) for h in clean]
    return (
        [h.to(device, dtype).requires_grad_() for h in clean],
        [h.to(device, other or dtype).requires_grad_() for h in perturbed],
    )


def gradients(loss: Tensor, tensors: Sequence[Tensor], upstream: float = 1.0) -> list[Tensor]:
    found = torch.autograd.grad(loss, tensors, torch.full_like(loss, upstream), allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, tensors, strict=True)]


def compare(
    clean: Sequence[Tensor],
    perturbed: Sequence[Tensor],
    index: Any = None,
    *,
    reduction: str = "mean",
    stop_gradient: str = "clean",
    impl: str,
    upstream: float = 1.0,
) -> None:
    """Error against float64 no larger than the plain version's own in the given dtypes, plus a margin.

    Margins: values 4 float32 roundings of themselves (64 of float64, as the reference has those too); gradients one
    rounding of their dtype of the largest entry. `stop_gradient` detaches a side first, as the regularizer does.
    """
    clean = [h.detach() for h in clean] if stop_gradient == "clean" else clean
    perturbed = [h.detach() for h in perturbed] if stop_gradient == "perturbed" else perturbed
    tensors = [*clean, *perturbed]
    device = tensors[0].device
    wide = [t.detach().double().cpu().requires_grad_(t.requires_grad) for t in tensors]
    low = [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]
    count = len(clean)
    on_host = _to_host(index)
    exact, exact_layers = plain(wide[:count], wide[count:], on_host, reduction)
    rough, rough_layers = plain(low[:count], low[count:], index, reduction)
    loss, per_layer = mse_over_layers(clean, perturbed, index, reduction=reduction, impl=impl)
    wanted = torch.float64 if torch.float64 in {t.dtype for t in tensors} else torch.float32
    assert loss.dtype == per_layer.dtype == wanted
    assert loss.shape == ()
    assert per_layer.shape == (count,)
    assert not per_layer.requires_grad
    assert loss.device == device
    eps = torch.finfo(wanted).eps * (16 if wanted == torch.float64 else 1)
    _close(per_layer, exact_layers, rough_layers, 4 * eps * exact_layers)
    _close(loss, exact, rough, 4 * eps * exact.abs())

    with_gradient = [i for i, t in enumerate(tensors) if t.requires_grad]
    compared, wide, low = ([side[i] for i in with_gradient] for side in (tensors, wide, low))
    found = gradients(loss, compared, upstream)
    exact_gradients, rough_gradients = gradients(exact, wide, upstream), gradients(rough, low, upstream)
    for tensor, g, e, r in zip(compared, found, exact_gradients, rough_gradients, strict=True):
        assert g.shape == tensor.shape
        assert g.dtype == tensor.dtype
        info = torch.finfo(tensor.dtype)
        margin = info.eps * e.abs().max() + info.smallest_normal if e.numel() else torch.zeros(())
        _close(g, e, r, margin)
        assert not g.cpu()[e == 0].any(), "a position that was not selected has a gradient"


def _close(found: Tensor, exact: Tensor, rough: Tensor, margin: Tensor) -> None:
    if exact.numel() == 0:
        return
    found, exact, rough = (t.detach().double().cpu() for t in (found, exact, rough))
    assert not found.isnan().any()
    allowed = (rough - exact).abs().max() + margin.detach().double().max()
    error = (found - exact).abs().max()
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"


def _to_host(index: Any) -> Any:
    if isinstance(index, Tensor):
        return index.cpu()
    return index if index is None else [None if i is None else i.cpu() for i in index]
