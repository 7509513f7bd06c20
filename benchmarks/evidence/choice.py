"""The cells that tuning chose, and variants of them."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from dataclasses import replace
from typing import Any

from evidence.finetune import Spec
from evidence.store import spec_of

SEEDS = range(5)
SKILL_TUNING_TASKS = ["subtract-128", "subtract-128-noisy"]

Rows = list[dict[str, Any]]


def chosen(rows: Rows, experiment: str) -> dict[str, Spec]:
    """The cell of each method with the best mean score over tasks and seeds of a tuning experiment."""
    scores: dict[Spec, list[float]] = defaultdict(list)
    for row in rows:
        if row["experiment"] == experiment:
            cell = replace(spec_of(row), task="", seed=0)
            scores[cell].append(row["score"])
    best: dict[str, Spec] = {}
    for cell, values in scores.items():
        mean = statistics.fmean(values)
        if cell.label not in best or mean > statistics.fmean(scores[best[cell.label]]):
            best[cell.label] = cell
    return best


def around(rows: Rows, experiment: str, changes: dict[str, tuple[str, dict[str, Any]]]) -> list[Spec]:
    """Variants of a tuned flavour: label -> (the entry it starts from, changed settings)."""
    best = chosen(rows, "tune-skills")
    specs = []
    for label, (entry, changed) in changes.items():
        cell = best[entry]
        settings = json.dumps({**json.loads(cell.settings), **changed}, sort_keys=True)
        specs.append(replace(cell, experiment=experiment, label=label, settings=settings, split="test"))
    return [replace(s, task=task, seed=seed) for task in SKILL_TUNING_TASKS for s in specs for seed in SEEDS]
