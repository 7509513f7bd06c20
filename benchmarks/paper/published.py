"""The paper's numbers: Tables 1 to 6 cell by cell, and what its text says of them."""

from __future__ import annotations

import csv
from pathlib import Path

FILE = Path(__file__).parent / "published.csv"
CATEGORIES = ("math", "knowledge", "reasoning", "helpfulness")
TIMES = ("ms_per_step", "ms_sd")
ATTACKS = tuple(f"{name}_{steps}" for name in ("hexphi", "purebad", "advbench") for steps in (0, 5))
# Figure 5 has no table: how much smaller the standard deviation over prompt variations is, in percent.
FIGURE_5 = -92.1

Figures = dict[str, float]


def published() -> dict[tuple[str, str, str], dict[tuple[str, str], Figures]]:
    """(table, model, data) -> (method, setting) -> the figures of that row; scores and success rates in percent."""
    tables: dict[tuple[str, str, str], dict[tuple[str, str], Figures]] = {}
    with FILE.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            figures = {name: float(row[name]) for name in (*CATEGORIES, "rank", *TIMES, *ATTACKS) if row[name]}
            tables.setdefault((row["table"], row["model"], row["data"]), {})[row["method"], row["setting"]] = figures
    return tables


def mean_ranks(scores: dict[str, Figures]) -> dict[str, float]:
    """The mean over categories of a method's rank, 1 for the best; equal scores share the better rank.

    Args:
        scores: method -> score by category. The untuned model is not ranked and does not belong here.
    """
    present = [c for c in CATEGORIES if all(c in figures for figures in scores.values())]
    return {
        method: sum(1 + sum(other[c] > own[c] for other in scores.values()) for c in present) / len(present)
        for method, own in scores.items()
        if present
    }
