"""The cells that tuning chose, and variants of them."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from evidence.finetune import Spec
from evidence.store import Rows, spec_of

SEEDS = range(5)
SKILL_TUNING_TASKS = ["subtract-128", "subtract-128-noisy"]


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


def with_settings(cell: Spec, changed: dict[str, Any], label: str) -> Spec:
    """A cell with some of its settings changed, under another name."""
    return replace(cell, settings=json.dumps({**json.loads(cell.settings), **changed}, sort_keys=True), label=label)


def around(rows: Rows, experiment: str, changes: dict[str, tuple[str, dict[str, Any]]]) -> list[Spec]:
    """Variants of a tuned flavour: label -> (the entry it starts from, changed settings)."""
    best = chosen(rows, "tune-skills")
    cells = [with_settings(best[entry], changed, label) for label, (entry, changed) in changes.items()]
    return each(cells, experiment, SKILL_TUNING_TASKS)


def each(cells: Iterable[Spec], experiment: str, tasks: Iterable[str]) -> list[Spec]:
    """Every cell on the test data of every task, with every seed."""
    return [
        replace(cell, experiment=experiment, task=task, seed=seed, split="test")
        for task in tasks
        for cell in cells
        for seed in SEEDS
    ]
