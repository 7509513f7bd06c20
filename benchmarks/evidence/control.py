"""SFT at other learning rates than its own: what of a difference to SFT is the method, and what its learning rate.

Added after the comparison was seen: tuning gave SFT a larger learning rate than most methods, where it forgets more.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from evidence.choice import SEEDS, Rows, chosen
from evidence.finetune import Spec
from evidence.paired import Difference, difference

# Comparison -> (where its cells were tuned, its tasks).
COMPARED = {
    "compare-skills": ("tune-skills", ("subtract-128", "subtract-128-noisy", "subtract-16")),
    "compare-text": ("tune-text", ("gsm8k-64", "dolly-64")),
}


# On the skills each random direction was tuned by itself; the text tasks compare it at the settings of the gradient's.
RANDOM = {"LfU steering": "random-steering", "LfU LoRA": "random"}


def random_at_same(cell: Spec, flavour: str) -> Spec:
    """A flavour of LfU with everything as it was tuned, but a random direction."""
    settings = json.dumps({**json.loads(cell.settings), "flavour": flavour}, sort_keys=True)
    return replace(cell, settings=settings, label=f"{cell.label}, random direction at its settings")


def label_at(rate: float) -> str:
    """What SFT is called at a learning rate that is not its own."""
    return f"SFT, learning rate {rate:g}"


def control(rows: Rows) -> list[Spec]:
    """SFT at the learning rates that tuning chose for the flavours of LfU; on text also random directions."""
    specs = []
    for tuning, tasks in COMPARED.values():
        best = chosen(rows, tuning)
        if "SFT" not in best:
            continue
        rates = {cell.lr for label, cell in best.items() if label.startswith("LfU")} - {best["SFT"].lr}
        cells = [replace(best["SFT"], lr=rate, label=label_at(rate)) for rate in sorted(rates)]
        if tuning == "tune-text":
            cells += [random_at_same(best[label], flavour) for label, flavour in RANDOM.items()]
        specs += [
            replace(cell, experiment="control", task=task, seed=seed, split="test")
            for task in tasks
            for cell in cells
            for seed in SEEDS
        ]
    return specs


def sft_at(rows: Rows, task: str, rate: float) -> Rows:
    """SFT on a task of the skills at a learning rate: of the comparison, or of the control."""
    return [
        row
        for row in rows
        if row["task"] == task
        and row["lr"] == rate
        and row["method"] == "sft"
        and row["dropout"] == 0
        and row["experiment"] in ("compare-skills", "control")
    ]


def at_equal_rate(rows: Rows, experiment: str, metric: str) -> dict[tuple[str, str], tuple[float, Difference]]:
    """(task, label) -> (learning rate, method minus SFT at that learning rate), where both were run."""
    by_cell: dict[tuple[str, str, float], dict[int, float]] = {}
    for row in rows:
        if row["experiment"] in (experiment, "control"):
            label = "SFT" if row["method"] == "sft" and row["dropout"] == 0 else row["label"]
            by_cell.setdefault((row["task"], label, row["lr"]), {})[row["seed"]] = row[metric]
    found: dict[tuple[str, str], tuple[float, Difference]] = {}
    for (task, label, rate), ours in by_cell.items():
        theirs = by_cell.get((task, "SFT", rate), {})
        seeds = sorted(ours.keys() & theirs.keys())
        if label != "SFT" and len(seeds) > 1:
            found[task, label] = rate, difference([ours[s] for s in seeds], [theirs[s] for s in seeds])
    return found


def table(rows: Rows, experiment: str, metrics: dict[str, str]) -> str:
    """Every method of a comparison against SFT at the method's own learning rate.

    Args:
        rows: of all experiments.
        experiment: the comparison.
        metrics: column of the results -> heading.
    """
    columns: dict[str, Any] = {metric: at_equal_rate(rows, experiment, metric) for metric in metrics}
    text = [
        f"| task | method | learning rate | {' | '.join(metrics.values())} |",
        f"|---|---|---|{'---|' * len(metrics)}",
    ]
    first = columns[next(iter(metrics))]
    for (task, label), (rate, _) in first.items():
        cells = [str(columns[metric][task, label][1]) for metric in metrics]
        text.append(f"| {task} | {label} | {rate:g} | {' | '.join(cells)} |")
    return "\n".join(text) + "\n"
