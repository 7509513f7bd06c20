"""Eq. 5: l_cons between the clean and the perturbed hidden states of one step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from lfu_reg.distances.base import Distance, measure
from lfu_reg.hooks.forward_pass import State
from lfu_reg.model.autocast import without_autocast
from lfu_reg.model.tokens import rows
from lfu_reg.step.settings import Settings


def consistency(
    distance: Distance,
    clean: Sequence[State],
    perturbed: Sequence[State],
    samples: Tensor | None,
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """l_cons over the tokens that count, averaged over layers, and detached per-layer distances [K]."""
    # On a part of the batch this is an unbiased estimate: the part's sum is divided by the number of tokens that the
    # part has on average, not by those it happens to have.
    groups: dict[float, list[int]] = defaultdict(list)
    h, h_prime, index = [], [], []
    for number, (before, after) in enumerate(zip(clean, perturbed, strict=True)):
        axis = after.tokens.axis
        state = before.of(samples)
        h.append(_hidden_last(state.detach() if settings.stop_gradient == "clean" else state, axis))
        h_prime.append(
            _hidden_last(after.hidden.detach() if settings.stop_gradient == "perturbed" else after.hidden, axis)
        )
        index.append(after.tokens.index)
        groups[_share(before, after, axis)].append(number)
    with without_autocast(clean[0].hidden.device.type):
        if list(groups) == [1.0]:
            return measure(distance, h, h_prime, index, settings.reduction)
        # Stacks of different lengths (encoder and decoder) have different shares of their tokens in the samples.
        terms: list[Tensor] = []
        distances = [torch.empty(())] * len(h)
        for factor, members in groups.items():
            states = [h[i] for i in members], [h_prime[i] for i in members], [index[i] for i in members]
            loss, per_layer = measure(distance, *states, settings.reduction)
            terms.append(loss * (factor * len(members) / len(h)))
            for i, value in zip(members, per_layer, strict=True):
                distances[i] = value * factor
        return torch.stack(terms).sum(), torch.stack(distances)


def displacement(clean: Sequence[State], perturbed: Sequence[State], samples: Tensor | None) -> tuple[Tensor, Tensor]:
    """||h' - h|| and ||h|| over the tokens that count and all layers, detached."""
    moved, length = [], []
    for before, after in zip(clean, perturbed, strict=True):
        states = before.of(samples).detach(), after.hidden.detach()
        h, h_prime = (rows(state, after.tokens.axis, after.tokens.index).float() for state in states)
        moved.append((h_prime - h).norm().to(clean[0].hidden.device))
        length.append(h.norm().to(clean[0].hidden.device))
    return torch.stack(moved).norm(), torch.stack(length).norm().clamp_min(torch.finfo(torch.float32).tiny)


def relative_distance(clean: Sequence[State], perturbed: Sequence[State], samples: Tensor | None) -> Tensor:
    """||h' - h|| / ||h||: how far the perturbation reached."""
    moved, length = displacement(clean, perturbed, samples)
    return moved / length


def rounding(states: Sequence[State]) -> float:
    """Relative rounding of the coarsest dtype that hidden states have, or are computed in under autocast."""
    dtypes = {state.hidden.dtype for state in states}
    kinds = {state.hidden.device.type for state in states}
    dtypes |= {torch.get_autocast_dtype(kind) for kind in kinds if torch.is_autocast_enabled(kind)}
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def _hidden_last(hidden: Tensor, axis: int) -> Tensor:
    return hidden if axis in (-1, hidden.dim() - 1) else rows(hidden, axis)


def _share(clean: State, perturbed: State, axis: int) -> float:
    """Tokens in the samples, divided by the tokens that so many samples have on average."""

    def positions(state: State) -> int:
        return state.hidden.numel() // max(state.hidden.shape[axis], 1)

    def counted(state: State) -> int:
        return positions(state) if state.tokens.index is None else state.tokens.index.numel()

    expected = counted(clean) * positions(perturbed) / max(positions(clean), 1)
    return counted(perturbed) / expected if expected else 1.0
