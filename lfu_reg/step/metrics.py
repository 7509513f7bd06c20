"""The figures of a step, as a user logs them.

"loss", "sft_loss", "consistency_loss", "ascent_grad_norm" (||g||), "distance/<layer>", "alpha", "lam",
"gradient_ratio" (|lam grad l_cons| / |grad l_SFT| over the trained parameters), "gradient_cosine" (between the two),
"relative_distance" (||h' - h|| / ||h||), "empty_steps" (how many had no token that counts, so that l_cons = 0),
"unrepeatable_steps" (at how many the loss was tried and did not repeat). A step that is plain SFT has neither ||g|| nor
distances, and its "consistency_loss" is zero: what a loop reads at every step is there at every step.

The ratio is of this step where `strength` sets lam. The cosine and the distance, and with a fixed lam the ratio, are
measured at the first ten regularized steps and at every tenth, and stay until they are measured again: the price is one
more reading of the gradients and of the hidden states.

Tensors are detached and stay on their devices, so only who reads a figure waits for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lfu_reg.hooks.forward_pass import State
from lfu_reg.step.progress import Progress
from lfu_reg.step.strength import StepStrength


def of_step(
    terms: Mapping[str, Tensor],
    progress: Progress,
    strength: StepStrength,
    states: Sequence[State] = (),
    distances: Iterable[Tensor] = (),
) -> dict[str, Any]:
    """Its terms, the distance of each of the K states to its perturbed twin, and what was measured last."""
    return {
        **{name: value.detach() for name, value in terms.items()},
        **{f"distance/{label}": value for label, value in zip(_labels(states), distances, strict=True)},
        **strength.figures,
        "empty_steps": progress.empty_steps,
        "unrepeatable_steps": progress.unrepeatable_steps,
        "alpha": strength.alpha,
        "lam": strength.lam,
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
