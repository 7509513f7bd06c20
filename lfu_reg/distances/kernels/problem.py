"""What is asked of a kernel, checked: the layers of one device and one pair of dtypes, with their token indices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Problem:
    """K layers that agree in device and dtypes. It does not hold their tensors, which autograd may move away.

    Attributes:
        layers: the layers' numbers in the caller's lists.
        index: per layer, a contiguous int64 tensor [N_l] on the same device, or None for all positions.
        selected: N_l per layer.
        divisors: N_l H_l or N_l per layer, at least 1, so that a distance over nothing is 0.
        mean: whether the hidden dimension is averaged.
        dtypes: of h and of h'.
        device: where everything is.
    """

    layers: list[int]
    index: list[Tensor | None]
    selected: list[int]
    divisors: list[int]
    mean: bool
    dtypes: tuple[torch.dtype, torch.dtype]
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """Of sums and results: float32, or float64 if one of the two sides is."""
        return torch.float64 if torch.float64 in self.dtypes else torch.float32


def describe_problems(
    clean: Sequence[Tensor],
    perturbed: Sequence[Tensor],
    token_index: Tensor | Sequence[Tensor | None] | None,
    reduction: str,
) -> list[Problem]:
    """Check the arguments of `mse_over_layers` and group the layers by device and dtypes, the first layer's first.

    Raises:
        TypeError: for integer tensors, or a token index that is not int64.
        ValueError: for lists or shapes that do not fit each other, or an unknown option.
    """
    count = len(clean)
    if count != len(perturbed):
        raise ValueError(f"{count} clean and {len(perturbed)} perturbed tensors; one of each per layer is needed.")
    if count == 0:
        raise ValueError("There are no layers to compare: both lists are empty.")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r}; allowed are 'mean' and 'sum'.")
    if token_index is None or isinstance(token_index, Tensor):
        token_index = [token_index] * count
    if len(token_index) != count:
        raise ValueError(f"token_index has {len(token_index)} entries for {count} layers.")

    problems: dict[tuple[torch.device, torch.dtype, torch.dtype], Problem] = {}
    moved: dict[tuple[int, torch.device], Tensor] = {}  # layers mostly share an index
    for layer, (h, h_prime, index) in enumerate(zip(clean, perturbed, token_index, strict=True)):
        _check_layer(layer, h, h_prime)
        shape, device = h.shape, h.device
        selected = positions = prod(shape[:-1])
        if index is not None:
            _check_index(layer, index, positions)
            selected = len(index)
            if (id(index), device) not in moved:
                # Kernels read it by its address.
                moved[id(index), device] = index.to(device, non_blocking=True).contiguous()
            index = moved[id(index), device]
        key = (device, h.dtype, h_prime.dtype)
        if key not in problems:
            problems[key] = Problem([], [], [], [], reduction == "mean", key[1:], device)
        problem = problems[key]
        problem.layers.append(layer)
        problem.index.append(index)
        problem.selected.append(selected)
        problem.divisors.append(max(1, selected * (shape[-1] if problem.mean else 1)))
    return list(problems.values())


def _check_layer(layer: int, h: Tensor, h_prime: Tensor) -> None:
    for name, dtype in (("clean", h.dtype), ("perturbed", h_prime.dtype)):
        if not dtype.is_floating_point:
            raise TypeError(f"Layer {layer}: {name} is {dtype}; floating-point hidden states are needed.")
    if h.shape != h_prime.shape:
        raise ValueError(
            f"Layer {layer}: clean has shape {list(h.shape)} and perturbed {list(h_prime.shape)}; "
            "both passes must give the same shape."
        )
    if h.dim() == 0:
        raise ValueError(f"Layer {layer}: hidden states are scalars; shape [..., hidden] is needed.")
    if h.device != h_prime.device:
        raise ValueError(f"Layer {layer}: clean is on {h.device} and perturbed on {h_prime.device}.")


def _check_index(layer: int, index: Tensor, positions: int) -> None:
    if not isinstance(index, Tensor):
        raise TypeError(f"Layer {layer}: token_index is a {type(index).__name__}; an int64 tensor or None is needed.")
    if index.dtype != torch.int64:
        cure = "; turn a mask into positions with mask.flatten().nonzero().squeeze(1)"
        raise TypeError(
            f"Layer {layer}: token_index is {index.dtype}, int64 positions are needed"
            f"{cure if index.dtype == torch.bool else ''}."
        )
    if index.dim() != 1:
        raise ValueError(f"Layer {layer}: token_index has shape {list(index.shape)}; [N] flat positions are needed.")
    if len(index) > positions:
        raise ValueError(
            f"Layer {layer}: token_index selects {len(index)} of {positions} positions; "
            "each position counts at most once."
        )
