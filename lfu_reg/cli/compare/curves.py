"""How far LfU is from SFT's own curve: what SFT forgets, over learning rates and scales, where it learns as well."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median, stdev
from typing import Any

from lfu_reg.cli.compare.plan import Run

BETWEEN = 25  # points between two scales that were scored: a straight line, as the scales go on between them
CONFIDENCE = 0.95

Point = tuple[float, float]  # held-out loss, forgotten: less is better of both


@dataclass(frozen=True)
class Gap:
    """What LfU forgets less than SFT where SFT learns at least as well, over seeds.

    Attributes:
        setting: LfU's.
        row: one of its rows.
        values: nats, one per seed.
        mean: of the values.
        margin: half the width of the confidence interval of the mean, over all settings that are looked at together;
            infinite for one seed.
    """

    setting: str
    row: Mapping[str, Any]
    values: tuple[float, ...]
    mean: float
    margin: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity."""
        margin = self.margin if math.isfinite(self.margin) else None
        return {"setting": self.setting, "values": self.values, "mean": self.mean, "margin": margin}

    def seeds_to_tell(self, looked_at: int) -> int | None:
        """Seeds after which a difference of this size and spread would show; None if a hundred do not suffice."""
        spread = stdev(self.values)
        return next((n for n in range(2, 101) if abs(self.mean) > half_width(spread, n, looked_at)), None)


def forgotten(point: Mapping[str, Any], base: Mapping[str, Any]) -> float:
    """Nats: the mean rise of the losses on what was to be kept; without any, the divergence from the base model."""
    if not point["kept"]:
        return float(point["kl"])
    return fmean(scores["loss"] - base["kept"][name]["loss"] for name, scores in point["kept"].items())


def place(point: Mapping[str, Any], base: Mapping[str, Any]) -> Point:
    """Where a model is in the plane of learning and forgetting."""
    return point["domain"]["loss"], forgotten(point, base)


def sft_curve(rows: Sequence[Mapping[str, Any]], base: Mapping[str, Any], seed: int) -> list[Point]:
    """Where SFT gets to with one seed: its adapters at every scale from none, the base model, to all."""
    found = [place(base, base)]
    for row in rows:
        if row["step"] is None and row["seed"] == seed and row["points"]:
            found += between([place(base, base), *(place(point, base) for point in row["points"])])
    return found


def between(corners: Sequence[Point]) -> list[Point]:
    """Points on the straight lines from each corner to the next; the first corner is left out."""
    parts = [part / BETWEEN for part in range(1, BETWEEN + 1)]
    return [
        (x + part * (to_x - x), y + part * (to_y - y)) for (x, y), (to_x, to_y) in pairwise(corners) for part in parts
    ]


def least_forgotten(curve: Sequence[Point], loss: float) -> float:
    """What SFT forgets at least where its held-out loss is as low as `loss`; where it never is, where it is lowest."""
    as_good = [forgot for own, forgot in curve if own <= loss]
    return min(as_good) if as_good else min(curve)[1]


def gaps(rows: Sequence[Mapping[str, Any]], base: Mapping[str, Any]) -> list[Gap]:
    """Of each setting of LfU, its adapter as trained, the largest gap first; seeds without both methods are out."""
    curves = {row["seed"]: sft_curve(rows, base, row["seed"]) for row in rows if row["step"] is None and row["points"]}
    found: dict[str, dict[int, float]] = {}
    examples: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        if row["step"] is not None and row["points"] and row["seed"] in curves:
            loss, forgot = place(row["points"][-1], base)
            setting = Run.of(row).setting
            examples.setdefault(setting, row)
            found.setdefault(setting, {})[row["seed"]] = least_forgotten(curves[row["seed"]], loss) - forgot
    listed = [
        Gap(setting, examples[setting], values := tuple(by_seed.values()), fmean(values), margin(values, len(found)))
        for setting, by_seed in found.items()
    ]
    return sorted(listed, key=lambda gap: -gap.mean)


def margin(values: Sequence[float], looked_at: int) -> float:
    """Half the width of Student's confidence interval of a mean, by Bonferroni's rule if several are looked at."""
    return half_width(stdev(values), len(values), looked_at) if len(values) > 1 else math.inf


def half_width(spread: float, count: int, looked_at: int) -> float:
    """Of the interval for the mean of `count` values with this standard deviation."""
    from scipy.stats import t

    quantile = float(t.ppf(1 - (1 - CONFIDENCE) / (2 * looked_at), count - 1))
    return quantile * spread / math.sqrt(count)


def per_step(row: Mapping[str, Any]) -> float:
    """Seconds of a step: the median, the first left out, in which memory is counted."""
    return float(median(row["step_seconds"][1:] or row["step_seconds"]))


def cost(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> float:
    """Time of a step in steps of SFT on the same batches: the median of their ratios, the first left out."""
    same = [other for other in rows if other["step"] is None and other["seed"] == row["seed"] and other["points"]]
    ratios = [
        mine / theirs
        for other in same
        for mine, theirs in zip(row["step_seconds"][1:], other["step_seconds"][1:], strict=False)
    ]
    return median(ratios) if ratios else math.nan
