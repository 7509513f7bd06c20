"""What is asked of a kernel, checked: the layers of one device with their token indices, scales and weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

# Shapes, dtypes and devices of a layer's two tensors, and the identity of its index.
_Kind: TypeAlias = tuple[torch.Size, torch.Size, torch.dtype, torch.dtype, torch.device, torch.device, int]


@dataclass(slots=True)
class Problem:
    """The layers on one device, K of them; every sequence has one entry a layer.

    Attributes:
        clean: tensors [..., hidden_l].
        perturbed: tensors of the same shapes.
        index: int64 tensors [N_l] on the same device, or None for all positions.
        kinds: layers with the same number agree in shape, dtypes and index tensor.
        scales: 1/(N_l H_l) or 1/N_l; 0 where nothing is selected.
        weights: numbers, or a tensor [K] on the same device.
        layers: the layers' numbers in the caller's lists.
        grad_clean: whether `clean` gets a gradient.
        grad_perturbed: whether `perturbed` gets one.
        overwrite: whether h' - h may be written over the clean tensor.
        dtype: of the results: float32, or float64 if any layer is float64.
        device: where everything is.
        spent: whether backward has run.
    """

    clean: list[Tensor]
    perturbed: list[Tensor]
    index: list[Tensor | None]
    kinds: list[int]
    scales: list[float]
    weights: list[float] | Tensor
    layers: list[int]
    grad_clean: bool
    grad_perturbed: bool
    overwrite: list[bool]
    dtype: torch.dtype
    device: torch.device
    spent: bool = False

    def spend(self) -> None:
        """Refuse a second backward where the first one consumed the differences.

        Raises:
            RuntimeError: if it was spent before.
        """
        if self.spent and any(self.overwrite):
            raise RuntimeError(
                "This loss was backpropagated before, and with overwrite_clean=True its first backward used up "
                "the differences. Call backward once, or pass overwrite_clean=False."
            )
        self.spent = True


def describe_problems(
    clean: Sequence[Tensor],
    perturbed: Sequence[Tensor],
    token_index: Tensor | Sequence[Tensor | None] | None,
    weights: Tensor | Sequence[float] | None,
    reduction: str,
    stop_gradient: str,
    overwrite_clean: bool,
) -> list[Problem]:
    """Check the arguments of `mse_over_layers` and split the layers by device.

    Raises:
        TypeError: for integer tensors, or a token index that is not int64.
        ValueError: for lists or shapes that do not fit each other, or an unknown option.
    """
    clean, perturbed = list(clean), list(perturbed)
    count = len(clean)
    if count != len(perturbed):
        raise ValueError(f"{count} clean and {len(perturbed)} perturbed tensors; one of each per layer is needed.")
    if count == 0:
        raise ValueError("There are no layers to compare: both lists are empty.")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r}; allowed are 'mean' and 'sum'.")
    if stop_gradient not in ("clean", "perturbed", "none"):
        raise ValueError(f"stop_gradient={stop_gradient!r}; allowed are 'clean', 'perturbed' and 'none'.")
    index = _index_per_layer(token_index, count)
    factors = _weights(weights, count)

    # Layers of a transformer look alike: each kind is checked once, which keeps the cost per layer to one look-up.
    known: dict[_Kind, tuple[int, float]] = {}
    found: list[tuple[int, float]] = []
    for layer, (h, h_prime, chosen) in enumerate(zip(clean, perturbed, index, strict=True)):
        kind = (h.shape, h_prime.shape, h.dtype, h_prime.dtype, h.device, h_prime.device, id(chosen))
        entry = known.get(kind)
        if entry is None:
            _check_layer(layer, h, h_prime, chosen)
            entry = known[kind] = (len(known), _scale(h, chosen, reduction))
        found.append(entry)

    grad_clean = stop_gradient != "clean" and any(h.requires_grad for h in clean)
    grad_perturbed = stop_gradient != "perturbed" and any(h.requires_grad for h in perturbed)
    may_overwrite = overwrite_clean and grad_perturbed and not grad_clean and torch.is_grad_enabled()
    overwrite = overwritable(clean, perturbed) if may_overwrite else [False] * count

    whole = Problem(
        clean=clean,
        perturbed=perturbed,
        index=index,
        kinds=[number for number, _ in found],
        scales=[scale for _, scale in found],
        weights=factors,
        layers=list(range(count)),
        grad_clean=grad_clean,
        grad_perturbed=grad_perturbed,
        overwrite=overwrite,
        dtype=torch.float64 if any(torch.float64 in kind[2:4] for kind in known) else torch.float32,
        device=clean[0].device,
    )
    devices = list(dict.fromkeys(kind[4] for kind in known))
    problems = [whole] if len(devices) == 1 else [_restrict(whole, device) for device in devices]
    for problem in problems:
        problem.index = _on_device(problem.index, problem.device)
        if isinstance(problem.weights, Tensor):
            problem.weights = problem.weights.to(problem.device, problem.dtype, non_blocking=True)
    return problems


def _restrict(whole: Problem, device: torch.device) -> Problem:
    """The layers of `whole` that are on `device`."""
    layers = [layer for layer in whole.layers if whole.clean[layer].device == device]
    weights = whole.weights
    return replace(
        whole,
        clean=[whole.clean[i] for i in layers],
        perturbed=[whole.perturbed[i] for i in layers],
        index=[whole.index[i] for i in layers],
        kinds=[whole.kinds[i] for i in layers],
        scales=[whole.scales[i] for i in layers],
        weights=weights[layers] if isinstance(weights, Tensor) else [weights[i] for i in layers],
        layers=layers,
        overwrite=[whole.overwrite[i] for i in layers],
        device=device,
    )


def overwritable(clean: Sequence[Tensor], perturbed: Sequence[Tensor]) -> list[bool]:
    """Per layer, whether h' - h can take the place of h and then become the gradient of h'.

    That needs both tensors contiguous and of one dtype, a gradient for h' and none for h, and memory that no other
    of the tensors shares (a layer that returns its input makes two entries of one storage).
    """
    users: dict[int, int] = {}
    for tensor in (*clean, *perturbed):
        storage = tensor.untyped_storage().data_ptr()
        users[storage] = users.get(storage, 0) + 1
    return [
        h.dtype == h_prime.dtype
        and h_prime.requires_grad
        and not h.requires_grad
        and h.is_contiguous()
        and h_prime.is_contiguous()
        and users[h.untyped_storage().data_ptr()] == 1
        for h, h_prime in zip(clean, perturbed, strict=True)
    ]


def _check_layer(layer: int, h: Tensor, h_prime: Tensor, index: Tensor | None) -> None:
    for name, tensor in (("clean", h), ("perturbed", h_prime)):
        if not tensor.is_floating_point():
            raise TypeError(f"Layer {layer}: {name} is {tensor.dtype}; floating-point hidden states are needed.")
    if h.shape != h_prime.shape:
        raise ValueError(
            f"Layer {layer}: clean has shape {list(h.shape)} and perturbed {list(h_prime.shape)}; "
            "both passes must give the same shape."
        )
    if h.dim() == 0:
        raise ValueError(f"Layer {layer}: hidden states are scalars; shape [..., hidden] is needed.")
    if h.device != h_prime.device:
        raise ValueError(f"Layer {layer}: clean is on {h.device} and perturbed on {h_prime.device}.")
    if index is None:
        return
    if index.dtype != torch.int64:
        cure = "; turn a mask into positions with mask.flatten().nonzero().squeeze(1)"
        raise TypeError(
            f"Layer {layer}: token_index is {index.dtype}, int64 positions are needed"
            f"{cure if index.dtype == torch.bool else ''}."
        )
    if index.dim() != 1:
        raise ValueError(f"Layer {layer}: token_index has shape {list(index.shape)}; [N] flat positions are needed.")
    if len(index) > math.prod(h.shape[:-1]):
        raise ValueError(
            f"Layer {layer}: token_index selects {len(index)} of {math.prod(h.shape[:-1])} positions; "
            "each position counts at most once."
        )


def _scale(h: Tensor, index: Tensor | None, reduction: str) -> float:
    selected = math.prod(h.shape[:-1]) if index is None else len(index)
    divisor = selected * h.shape[-1] if reduction == "mean" else selected
    # Nothing selected is a distance of 0, not 0/0.
    return 1.0 / divisor if divisor else 0.0


def _index_per_layer(token_index: Tensor | Sequence[Tensor | None] | None, count: int) -> list[Tensor | None]:
    if token_index is None or isinstance(token_index, Tensor):
        return [token_index] * count
    if len(token_index) != count:
        raise ValueError(f"token_index has {len(token_index)} entries for {count} layers.")
    for layer, entry in enumerate(token_index):
        if entry is not None and not isinstance(entry, Tensor):
            raise TypeError(f"Layer {layer}: token_index is a {type(entry).__name__}; an int64 tensor or None.")
    return list(token_index)


def _weights(weights: Tensor | Sequence[float] | None, count: int) -> list[float] | Tensor:
    if weights is None:
        return [1.0 / count] * count
    if isinstance(weights, Tensor):
        if weights.shape != (count,):
            raise ValueError(f"weights has shape {list(weights.shape)}; [{count}] is needed, one a layer.")
        if weights.requires_grad:
            raise ValueError("weights requires a gradient, but weights are constants here; pass weights.detach().")
        return weights
    if len(weights) != count:
        raise ValueError(f"{len(weights)} weights for {count} layers.")
    return [float(weight) for weight in weights]


def _on_device(index: list[Tensor | None], device: torch.device) -> list[Tensor | None]:
    """The same list where the tensors are on `device` already, else with one copy per distinct tensor."""
    moved = {id(t): t.to(device, non_blocking=True) for t in index if t is not None and t.device != device}
    return [moved.get(id(t), t) for t in index] if moved else index
