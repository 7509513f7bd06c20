"""Ways to compute the squared difference over layers: lfu_reg's, and its opponents in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lfu_reg.distances.kernels.entry import mse_over_layers

# (clean, perturbed, positions or None) -> loss
Provider = Callable[[list[Tensor], list[Tensor], Tensor | None], Tensor]


def _take(states: Tensor, index: Tensor | None) -> Tensor:
    return states if index is None else states[index]


def eager(clean: list[Tensor], perturbed: list[Tensor], index: Tensor | None) -> Tensor:
    """F.mse_loss layer by layer in the states' own dtype: the least work, and the least digits in half precision."""
    pairs = zip(clean, perturbed, strict=True)
    return torch.stack([F.mse_loss(_take(p, index), _take(c, index)) for c, p in pairs]).mean()


def eager_float32(clean: list[Tensor], perturbed: list[Tensor], index: Tensor | None) -> Tensor:
    """F.mse_loss layer by layer, accumulated in float32 as the kernel does."""
    pairs = zip(clean, perturbed, strict=True)
    return torch.stack([F.mse_loss(_take(p, index).float(), _take(c, index).float()) for c, p in pairs]).mean()


def stacked(clean: list[Tensor], perturbed: list[Tensor], index: Tensor | None) -> Tensor:
    """All layers in one tensor: the least calls; no distance of a single layer comes out."""
    c, p = torch.stack(clean), torch.stack(perturbed)
    if index is not None:
        c, p = c[:, index], p[:, index]
    return F.mse_loss(p.float(), c.float())


def foreach(clean: list[Tensor], perturbed: list[Tensor], index: Tensor | None) -> Tensor:
    """torch._foreach_*: few calls for all layers."""
    differences = torch._foreach_sub([_take(p, index) for p in perturbed], [_take(c, index) for c in clean])
    norms = torch.stack(torch._foreach_norm(differences, 2, torch.float32))
    return norms.square().mean() / differences[0].numel()


def compiled() -> Provider:
    """The float32 loop through torch.compile, fresh for every shape so that it never falls back."""
    torch._dynamo.reset()
    return torch.compile(eager_float32, dynamic=False)


def ours(impl: Any) -> Provider:
    def loss(clean: list[Tensor], perturbed: list[Tensor], index: Tensor | None) -> Tensor:
        return mse_over_layers(clean, perturbed, index, impl=impl)[0]

    return loss


def providers() -> dict[str, Provider]:
    """All that runs on any device."""
    return {
        "twin": ours("torch"),
        "eager": eager,
        "eager float32": eager_float32,
        "stacked": stacked,
        "foreach": foreach,
        "compiled": compiled(),
    }
