"""Layers sorted by what they look like.

The shapes of a training run repeat at every step, so what follows from them alone is worked out once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import TypeAlias

import torch

# What a tensor looks like from outside: shape, dtype and device.
Look: TypeAlias = tuple[torch.Size, torch.dtype, torch.device]


@dataclass(frozen=True, slots=True, eq=False)
class Kinds:
    """K layers sorted into kinds: those that agree in shape, dtypes, device and index tensor.

    Attributes:
        of_layer: the kind of each layer.
        first: the first layer of each kind.
        looks: shape and dtype of h, and dtype of h', per kind.
        index: the number of its index tensor per kind, -1 for none.
        positions: number of positions per kind.
        hidden: hidden size per kind.
        dtype: of the results: float32, or float64 if any layer is float64.
        devices: where the layers are, in the order of their appearance.
    """

    of_layer: tuple[int, ...]
    first: tuple[int, ...]
    looks: tuple[tuple[torch.Size, torch.dtype, torch.dtype], ...]
    index: tuple[int, ...]
    positions: tuple[int, ...]
    hidden: tuple[int, ...]
    dtype: torch.dtype
    devices: tuple[torch.device, ...]


@lru_cache(maxsize=64)
def sort_layers(
    shapes: tuple[torch.Size, ...],
    dtypes: tuple[torch.dtype, ...],
    devices: tuple[torch.device, ...],
    index: tuple[int, ...],
) -> Kinds:
    """Check that the two sides of each layer fit each other, and sort the layers into kinds.

    Args:
        shapes: of the K clean and then of the K perturbed tensors.
        dtypes: of the same.
        devices: of the same.
        index: the number of each layer's token index, -1 for none.

    Raises:
        TypeError: for integer tensors.
        ValueError: for shapes or devices that differ, and for scalars.
    """
    looks, count = list(zip(shapes, dtypes, devices, strict=True)), len(index)
    known: dict[tuple[Look, Look, int], int] = {}
    first: list[int] = []
    of_layer = []
    for layer, key in enumerate(zip(looks[:count], looks[count:], index, strict=True)):
        if key not in known:
            _check_layer(layer, *key[:2])
            known[key] = len(known)
            first.append(layer)
        of_layer.append(known[key])
    seen = [h[0] for h, _, _ in known]
    return Kinds(
        of_layer=tuple(of_layer),
        first=tuple(first),
        looks=tuple((h[0], h[1], h_prime[1]) for h, h_prime, _ in known),
        index=tuple(number for _, _, number in known),
        positions=tuple(prod(shape[:-1]) for shape in seen),
        hidden=tuple(shape[-1] for shape in seen),
        dtype=torch.float64 if any(torch.float64 in (h[1], p[1]) for h, p, _ in known) else torch.float32,
        devices=tuple(dict.fromkeys(h[2] for h, _, _ in known)),
    )


def _check_layer(layer: int, h: Look, h_prime: Look) -> None:
    for name, (_, dtype, _) in (("clean", h), ("perturbed", h_prime)):
        if not dtype.is_floating_point:
            raise TypeError(f"Layer {layer}: {name} is {dtype}; floating-point hidden states are needed.")
    if h[0] != h_prime[0]:
        raise ValueError(
            f"Layer {layer}: clean has shape {list(h[0])} and perturbed {list(h_prime[0])}; "
            "both passes must give the same shape."
        )
    if len(h[0]) == 0:
        raise ValueError(f"Layer {layer}: hidden states are scalars; shape [..., hidden] is needed.")
    if h[2] != h_prime[2]:
        raise ValueError(f"Layer {layer}: clean is on {h[2]} and perturbed on {h_prime[2]}.")
