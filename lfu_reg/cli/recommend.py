"""Settings that meet a budget, from the measured phases of the exact step.

Only pass 2 and its backward can be made smaller: on part of the samples, with part of the layers, or at part of the
steps. What each of them does to the gradient is measured in docs/cost.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

FRACTIONS = (0.75, 0.5, 0.25, 0.125)
EVERY = (2, 3, 4, 8, 16)
EARLY = "another objective: the first third of the layers"
LATE = "another objective: the last third of the layers"
PASS_2 = ("perturbed forward", "distance", "perturbed backward")


@dataclass(frozen=True)
class Option:
    """Settings of LfURegularizer.

    Attributes:
        auxiliary: theta_aux.
        options: other arguments than the defaults.
        ratio: of its time to SFT's, predicted.
        effect: on the gradient of the consistency term.
    """

    auxiliary: str
    options: Mapping[str, Any]
    ratio: float
    effect: str

    @property
    def label(self) -> str:
        """As it is written in code."""
        arguments = [repr(self.auxiliary), *(f"{key}={value!r}" for key, value in self.options.items())]
        return f"LfURegularizer(model, {', '.join(arguments)})"


def options_within(budget: float, auxiliary: str, ratio: float, share_2: float, batch: int) -> list[Option]:
    """Per kind of saving, the option that changes the gradient least among those within the budget.

    Args:
        budget: allowed ratio to SFT's time.
        auxiliary: theta_aux.
        ratio: of the exact step.
        share_2: time of pass 2 and its backward, in units of SFT's.
        batch: samples.

    Returns:
        The exact step alone if it is within the budget; else one option per kind, perhaps none.
    """
    exact = Option(auxiliary, {}, ratio, "exact")
    if ratio <= budget:
        return [exact]
    families = (
        _samples(auxiliary, ratio, share_2, batch),
        *([] if auxiliary == "weights" else [_late(auxiliary, ratio, share_2)]),
        _early(auxiliary, ratio, share_2),
        _steps(auxiliary, ratio),
    )
    found = (next((option for option in family if option.ratio <= budget), None) for family in families)
    return [option for option in found if option is not None]


def _samples(auxiliary: str, ratio: float, share_2: float, batch: int) -> Iterator[Option]:
    for fraction in FRACTIONS:
        number = max(1, round(fraction * batch))
        yield Option(
            auxiliary,
            {"batch_fraction": fraction},
            ratio - (1 - number / batch) * share_2,
            "no bias, more variance: part of the samples",
        )


def _early(auxiliary: str, ratio: float, share_2: float) -> Iterator[Option]:
    yield Option(auxiliary, {"layers": "early"}, ratio - 2 / 3 * share_2, EARLY)


def _late(auxiliary: str, ratio: float, share_2: float) -> Iterator[Option]:
    # What lies below is run once, forward and backward.
    yield Option(auxiliary, {"layers": "late"}, ratio - 2 / 3 * share_2, LATE)


def _steps(auxiliary: str, ratio: float) -> Iterator[Option]:
    for k in EVERY:
        effect = f"the exact gradient at one step in {k}; multiply lam by {k} to keep its weight"
        yield Option(auxiliary, {"every": k}, 1 + (ratio - 1) / k, effect)
