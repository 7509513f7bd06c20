"""Means with confidence intervals, and paired comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from evidence.store import Rows

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean and half the width of its confidence interval."""

    mean: float
    half_width: float
    count: int

    @property
    def standard_error(self) -> float:
        """Of the mean; not a number where there is one value only."""
        return self.half_width / quantile(self.count - 1)

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.half_width:.3f}"


@dataclass(frozen=True)
class Difference(Estimate):
    """A mean of paired differences, with the p-value of a paired t-test."""

    p: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ± {self.half_width:.3f} (p {self.p:.3f})"


def paired(ours: Rows, reference: Rows, metric: str, *, sign: int = 1, at_least: int = 2) -> Difference | None:
    """ours - reference on the seeds that both have; None where these are fewer than `at_least`.

    Args:
        ours, reference: runs, one a seed.
        metric: column of the results.
        sign: -1 turns the difference round.
        at_least: seeds.
    """
    values, references = ({row["seed"]: sign * row[metric] for row in part} for part in (ours, reference))
    seeds = sorted(values.keys() & references.keys())
    if len(seeds) < at_least:
        return None
    return difference([values[seed] for seed in seeds], [references[seed] for seed in seeds])


def quantile(degrees: float) -> float:
    """Student's t that bounds a two-sided interval."""
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, degrees))


def estimate(values: Sequence[float]) -> Estimate:
    """Mean with a 95 % confidence interval from Student's t."""
    array = np.asarray(values, dtype=float)
    if len(array) < 2:
        return Estimate(float(array.mean()), float("nan"), len(array))
    half = quantile(len(array) - 1) * float(stats.sem(array))
    return Estimate(float(array.mean()), half, len(array))


def difference(values: Sequence[float], reference: Sequence[float]) -> Difference:
    """values - reference, pair by pair."""
    deltas = np.asarray(values, dtype=float) - np.asarray(reference, dtype=float)
    if len(deltas) < 2:
        p = float("nan")
    elif np.allclose(deltas, deltas[0]):  # no spread: the t-test is not defined
        p = 1.0 if np.allclose(deltas, 0) else 0.0
    else:
        p = float(stats.ttest_1samp(deltas, 0.0).pvalue)
    whole = estimate(deltas.tolist())
    return Difference(whole.mean, whole.half_width, whole.count, p)
