"""How long runs will take, from how long the published ones took."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Hashable, Iterable

from evidence.finetune import Spec
from evidence.store import Rows
from evidence.tasks import TASKS


def processor_seconds(specs: Iterable[Spec], published: Rows) -> float:
    """Expected seconds on one core.

    A run takes the mean of its cell's published rows. Older rows have the time of training only; what measuring took is
    then taken from the rows of the same base model that have both. A cell without any time is as long as the mean of
    its base model's rows. Not a number if nothing was timed.
    """
    measuring: dict[str, list[float]] = defaultdict(list)
    for row in published:
        if "seconds" in row and "train_seconds" in row:
            measuring[TASKS[row["task"]].base].append(row["seconds"] - row["train_seconds"])
    times: dict[Hashable, list[float]] = defaultdict(list)
    for row in published:
        base = TASKS[row["task"]].base
        if "seconds" in row:
            taken = row["seconds"]
        elif "train_seconds" in row:
            taken = row["train_seconds"] + (statistics.median(measuring[base]) if measuring[base] else 0.0)
        else:
            continue
        for group in ((row["experiment"], row["task"], row["label"]), base):
            times[group].append(taken)

    def expected(spec: Spec) -> float:
        known = times.get((spec.experiment, spec.task, spec.label)) or times.get(TASKS[spec.task].base)
        return statistics.fmean(known) if known else float("nan")

    return sum(expected(spec) for spec in specs)
