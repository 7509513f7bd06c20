"""Eq. 5: l_cons between the clean and the perturbed hidden states of one step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lfu_reg.distances.base import Distance, measure
from lfu_reg.hooks.forward_pass import State
from lfu_reg.model.autocast import without_autocast
from lfu_reg.model.tokens import rows
from lfu_reg.step.settings import Settings


def consistency(
    distance: Distance, clean: Sequence[State], perturbed: Sequence[State], samples: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor]:
    """l_cons over the tokens that count, averaged over layers, and detached per-layer distances [K]."""
    fixed, moved = settings.stop_gradient == "clean", settings.stop_gradient == "perturbed"
    layers = list(zip(clean, perturbed, strict=True))
    h = [_hidden_last(before.of(samples), after.tokens.axis, detached=fixed) for before, after in layers]
    h_prime = [_hidden_last(after.hidden, after.tokens.axis, detached=moved) for _, after in layers]
    index = [state.tokens.index for state in perturbed]
    with without_autocast(clean[0].hidden.device.type):
        if samples is None:
            return measure(distance, h, h_prime, index, settings.reduction)
        # On a part of the batch this is an unbiased estimate: the part's sum is divided by the number of tokens that it
        # has on average, not by those it happens to have. That is another share for encoder and decoder.
        parts = zip(h, h_prime, index, strict=True)
        found = [measure(distance, [one], [other], [where], settings.reduction) for one, other, where in parts]
        shares = [_share(before, after) for before, after in layers]
        terms = [loss.to(h[0].device) * share for (loss, _), share in zip(found, shares, strict=True)]
        return torch.stack(terms).mean(), torch.stack(terms).detach()


def displacement(clean: Sequence[State], perturbed: Sequence[State], samples: Tensor | None) -> tuple[Tensor, Tensor]:
    """||h' - h|| and ||h|| over the tokens that count and all layers, detached."""
    moved, length = [], []
    for before, after in zip(clean, perturbed, strict=True):
        states = before.of(samples).detach(), after.hidden.detach()
        h, h_prime = (rows(state, after.tokens.axis, after.tokens.index).float() for state in states)
        moved.append((h_prime - h).norm().to(clean[0].hidden.device))
        length.append(h.norm().to(clean[0].hidden.device))
    return torch.stack(moved).norm(), torch.stack(length).norm().clamp_min(torch.finfo(torch.float32).tiny)


def rounding(states: Sequence[State]) -> float:
    """Relative rounding of the coarsest dtype that hidden states have, or are computed in under autocast."""
    dtypes = {state.hidden.dtype for state in states}
    kinds = {state.hidden.device.type for state in states}
    dtypes |= {torch.get_autocast_dtype(kind) for kind in kinds if torch.is_autocast_enabled(kind)}
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def _hidden_last(hidden: Tensor, axis: int, *, detached: bool) -> Tensor:
    hidden = hidden.detach() if detached else hidden
    return hidden if axis in (-1, hidden.dim() - 1) else rows(hidden, axis)


def _share(clean: State, perturbed: State) -> float:
    """Tokens in the samples, divided by the tokens that so many samples have on average."""
    expected = _counted(clean) * len(perturbed.hidden) / max(len(clean.hidden), 1)
    return _counted(perturbed) / expected if expected else 1.0


def _counted(state: State) -> int:
    index, positions = state.tokens.index, state.hidden.numel() // max(state.hidden.shape[state.tokens.axis], 1)
    return positions if index is None else index.numel()
