"""Ways to compute the squared difference over layers: lfu_reg's, its opponents in plain torch, and two leads."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lfu_reg.distances.kernels.mse_over_layers import mse_over_layers
from lfu_reg.distances.kernels.mse_parts import Scratch, gradient, select, squared_sum

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


def ours(impl: Any, overwrite: bool = False) -> Provider:
    def loss(clean: list[Tensor], perturbed: list[Tensor], index: Tensor | None) -> Tensor:
        return mse_over_layers(clean, perturbed, index, impl=impl, overwrite_clean=overwrite)[0]

    return loss


def providers(device: str) -> dict[str, Provider]:
    found: dict[str, Provider] = {}
    if device != "cpu" and find_spec("triton") is not None:
        found |= {"triton": ours("triton"), "triton, overwrite": ours("triton", overwrite=True)}
    return found | {
        "twin": ours("torch"),
        "twin, overwrite": ours("torch", overwrite=True),
        **({"native": ours("native")} if device == "cpu" else {}),
        "eager": eager,
        "eager float32": eager_float32,
        "stacked": stacked,
        "foreach": foreach,
        "compiled": compiled(),
    }


class Tap(torch.autograd.Function):
    """Lead: the layer's hook computes d_l, and backward adds its gradient to the one that flows through h'_l.

    (h', h) -> (h', d); one pass less over memory than a gradient of its own plus autograd's addition.
    """

    @staticmethod
    def forward(ctx: Any, h_prime: Tensor, h: Tensor, overwrite: bool) -> tuple[Tensor, Tensor]:
        total = squared_sum(h, h_prime, select(h, None), overwrite, Scratch())
        ctx.overwrite = overwrite
        ctx.save_for_backward(h, None if overwrite else h_prime)
        ctx.set_materialize_grads(False)
        return h_prime.view_as(h_prime), torch.tensor(total / h.numel())

    @staticmethod
    def backward(ctx: Any, flowing: Tensor | None, upstream: Tensor | None) -> tuple[Tensor | None, None, None]:
        h, h_prime = ctx.saved_tensors
        if upstream is None:
            return flowing, None, None
        factor = 2 * upstream.item() / h.numel()
        if ctx.overwrite:
            own = h.detach()
            return (own.mul_(factor) if flowing is None else torch.add(flowing, own, alpha=factor, out=own)), None, None
        if flowing is None:
            return gradient(h_prime, h, select(h, None), factor, Scratch()), None, None
        result = torch.empty_like(flowing)
        step = max(1, (1 << 18) // h.shape[-1])  # parts that stay in the cache
        parts = (t.view(-1, h.shape[-1]).split(step) for t in (result, flowing, h_prime, h))
        for out, g, b, a in zip(*parts, strict=True):
            torch.add(g, torch.sub(b, a, out=out), alpha=factor, out=out)
        return result, None, None


def leads() -> dict[str, Callable[[list[Tensor], list[Tensor]], tuple[Tensor, list[Tensor]]]]:
    """(clean, perturbed) -> (loss, the states that the next layers read)."""

    def through(overwrite: bool) -> Any:
        def step(clean: list[Tensor], perturbed: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            return mse_over_layers(clean, perturbed, None, impl="torch", overwrite_clean=overwrite)[0], perturbed

        return step

    def tapped(overwrite: bool) -> Any:
        def step(clean: list[Tensor], perturbed: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            pairs = [Tap.apply(p, c, overwrite) for c, p in zip(clean, perturbed, strict=True)]
            return torch.stack([d for _, d in pairs]).mean(), [p for p, _ in pairs]

        return step

    return {
        "one function": through(False),
        "one function, overwrite": through(True),
        "fold": tapped(False),
        "fold, overwrite": tapped(True),
    }
