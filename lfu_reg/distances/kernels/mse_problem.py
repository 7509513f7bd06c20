"""What is asked of a kernel, checked: the layers of one device with their token indices, scales and weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor

from lfu_reg.distances.kernels.mse_kinds import Kinds, sort_layers

_SHAPE, _DTYPE, _DEVICE = attrgetter("shape"), attrgetter("dtype"), attrgetter("device")


@dataclass(slots=True)
class Problem:
    """The layers on one device, K of them.

    Attributes:
        clean: K tensors [..., hidden_l].
        perturbed: K tensors of the same shapes.
        kinds: what the layers look like.
        index: per kind, an int64 tensor [N_l] on the same device, or None for all positions.
        selected: N_l per kind.
        scales: per layer 1/(N_l H_l) or 1/N_l; 0 where nothing is selected.
        weights: K numbers, or a tensor [K] on the same device.
        layers: the layers' numbers in the caller's lists.
        grad_clean: whether `clean` gets a gradient.
        grad_perturbed: whether `perturbed` gets one.
        overwrite: per layer, whether h' - h may be written over the clean tensor.
        dtype: of the results.
        device: where everything is.
        spent: whether backward has run.
    """

    clean: list[Tensor]
    perturbed: list[Tensor]
    kinds: Kinds
    index: list[Tensor | None]
    selected: list[int]
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
    numbers, distinct = _number_indices(token_index, count)
    factors = _weights(weights, count)
    kinds = _sort([*clean, *perturbed], numbers)
    for kind, number in enumerate(kinds.index):
        if number >= 0:
            _check_index(kinds.first[kind], distinct[number], kinds.positions[kind])

    problems = []
    for device in kinds.devices:
        layers, part = list(range(count)), kinds
        if len(kinds.devices) > 1:
            layers = [layer for layer in layers if clean[layer].device == device]
        h, h_prime = [clean[i] for i in layers], [perturbed[i] for i in layers]
        if len(kinds.devices) > 1:
            part = _sort([*h, *h_prime], tuple(numbers[i] for i in layers))
        index = [_readable(distinct[n], device) if n >= 0 else None for n in part.index]
        selected = [len(i) if i is not None else n for i, n in zip(index, part.positions, strict=True)]
        scale = [_scale(*sizes, reduction) for sizes in zip(selected, part.hidden, strict=True)]
        grad_clean = stop_gradient != "clean" and any(t.requires_grad for t in h)
        grad_perturbed = stop_gradient != "perturbed" and any(t.requires_grad for t in h_prime)
        may_overwrite = overwrite_clean and grad_perturbed and not grad_clean and torch.is_grad_enabled()
        problems.append(
            Problem(
                clean=h,
                perturbed=h_prime,
                kinds=part,
                index=index,
                selected=selected,
                scales=[scale[kind] for kind in part.of_layer],
                weights=_weights_on(factors, layers, device, part.dtype),
                layers=layers,
                grad_clean=grad_clean,
                grad_perturbed=grad_perturbed,
                overwrite=overwritable(h, h_prime) if may_overwrite else [False] * len(layers),
                dtype=part.dtype,
                device=device,
            )
        )
    return problems


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


def _sort(both: list[Tensor], numbers: tuple[int, ...]) -> Kinds:
    return sort_layers(tuple(map(_SHAPE, both)), tuple(map(_DTYPE, both)), tuple(map(_DEVICE, both)), numbers)


def _check_index(layer: int, index: Tensor, positions: int) -> None:
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


def _scale(selected: int, hidden: int, reduction: str) -> float:
    divisor = selected * hidden if reduction == "mean" else selected
    # Nothing selected is a distance of 0, not 0/0.
    return 1.0 / divisor if divisor else 0.0


def _number_indices(
    token_index: Tensor | Sequence[Tensor | None] | None, count: int
) -> tuple[tuple[int, ...], list[Tensor]]:
    """Per layer the number of its token index, -1 for none, and the distinct tensors."""
    if token_index is None:
        return (-1,) * count, []
    if isinstance(token_index, Tensor):
        return (0,) * count, [token_index]
    if len(token_index) != count:
        raise ValueError(f"token_index has {len(token_index)} entries for {count} layers.")
    numbers: list[int] = []
    distinct: list[Tensor] = []
    known: dict[int, int] = {id(None): -1}
    for layer, entry in enumerate(token_index):
        number = known.get(id(entry))
        if number is None:
            if not isinstance(entry, Tensor):
                raise TypeError(f"Layer {layer}: token_index is a {type(entry).__name__}; an int64 tensor or None.")
            number = known[id(entry)] = len(distinct)
            distinct.append(entry)
        numbers.append(number)
    return tuple(numbers), distinct


def _readable(index: Tensor, device: torch.device) -> Tensor:
    """On the device and contiguous, as kernels read it by its address."""
    return index.to(device, non_blocking=True).contiguous()


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


def _weights_on(
    weights: list[float] | Tensor, layers: list[int], device: torch.device, dtype: torch.dtype
) -> list[float] | Tensor:
    if not isinstance(weights, Tensor):
        return [weights[layer] for layer in layers]
    # Indexing by a list waits for the device, so it is left out where all layers are meant.
    chosen = weights if len(layers) == len(weights) else weights[layers]
    return chosen.to(device, dtype, non_blocking=True)
