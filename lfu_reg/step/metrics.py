"""The figures of a step, as a user logs them.

"loss", "sft_loss", "consistency_loss", "ascent_grad_norm" (||g||), "distance/<layer>", "relative_distance"
(||h' - h|| / ||h||, measured at the first regularized step and every 50th), "empty_steps" (how many had no token that
counts, so that l_cons = 0), "unrepeatable_steps" (at how many the loss was tried and did not repeat), "alpha", "lam".

Tensors are detached and stay on their devices, so only who reads a figure waits for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lfu_reg.hooks.forward_pass import State
from lfu_reg.step.progress import Progress


def plain_step(
    loss: Tensor, before: Mapping[str, Any], progress: Progress, *, alpha: float, lam: float
) -> dict[str, Any]:
    """Of a step that is plain SFT; the last relative distance stays."""
    kept = {key: before[key] for key in ("relative_distance",) if key in before}
    return {
        "loss": loss.detach(),
        "sft_loss": loss.detach(),
        **kept,
        "unrepeatable_steps": progress.unrepeatable_steps,
        "alpha": alpha,
        "lam": lam,
    }


def regularized_step(
    terms: Mapping[str, Tensor | None],
    states: Sequence[State],
    distances: Tensor,
    progress: Progress,
    *,
    alpha: float,
    lam: float,
) -> dict[str, Any]:
    """Of a step with it: its terms, and the distance of each of the K states to its perturbed twin."""
    return {
        **{
            name: value.detach() if value is not None and value.requires_grad else value
            for name, value in terms.items()
        },
        **{f"distance/{label}": value for label, value in zip(_labels(states), distances, strict=True)},
        "empty_steps": progress.empty_steps,
        "unrepeatable_steps": progress.unrepeatable_steps,
        "alpha": alpha,
        "lam": lam,
    }


def _labels(states: Sequence[State]) -> list[str]:
    """Names of the states; a layer that ran several times gets numbers behind its name."""
    names = [state.name for state in states]
    seen: dict[str, int] = {}
    labels = []
    for name in names:
        seen[name] = seen.get(name, -1) + 1
        label = name or "logits"
        labels.append(f"{label}[{seen[name]}]" if names.count(name) > 1 else label)
    return labels
