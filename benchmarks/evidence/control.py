"""SFT at other learning rates than its own: what of a difference to SFT is the method, and what its learning rate.

Added after the comparison was seen: tuning gave SFT a larger learning rate than most methods, where it forgets more.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from evidence.choice import chosen, each, with_settings
from evidence.finetune import Spec
from evidence.paired import Difference, paired
from evidence.store import Rows

# Comparison -> (where its cells were tuned, its tasks).
COMPARED = {
    "compare-skills": ("tune-skills", ("subtract-128", "subtract-128-noisy", "subtract-16")),
    "compare-text": ("tune-text", ("gsm8k-64", "dolly-64")),
}
# On the skills each random direction was tuned by itself; the text tasks compare it at the settings of the gradient's.
RANDOM = {"LfU steering": "random-steering", "LfU LoRA": "random"}


def label_at(rate: float) -> str:
    """What SFT is called at a learning rate that is not its own."""
    return f"SFT, learning rate {rate:g}"


def control(rows: Rows) -> list[Spec]:
    """SFT at the learning rates that tuning chose for the flavours of LfU; on text also random directions."""
    specs: list[Spec] = []
    for tuning, tasks in COMPARED.values():
        best = chosen(rows, tuning)
        if "SFT" not in best:
            continue
        rates = {cell.lr for label, cell in best.items() if label.startswith("LfU")} - {best["SFT"].lr}
        cells = [replace(best["SFT"], lr=rate, label=label_at(rate)) for rate in sorted(rates)]
        if tuning == "tune-text":
            cells += [
                with_settings(best[label], {"flavour": flavour}, f"{label}, random direction at its settings")
                for label, flavour in RANDOM.items()
            ]
        specs += each(cells, "control", tasks)
    return specs


def sft_at(rows: Rows, task: str, rate: float, comparison: str = "compare-skills") -> Rows:
    """Plain SFT on a task at a learning rate: of a comparison, or of the control."""
    return [
        row
        for row in rows
        if (row["task"], row["lr"]) == (task, rate)
        and _is_plain_sft(row)
        and row["experiment"] in (comparison, "control")
    ]


def _is_plain_sft(row: dict[str, Any]) -> bool:
    return row["method"] == "sft" and row["dropout"] == 0


def at_equal_rate(rows: Rows, experiment: str, metric: str) -> dict[tuple[str, str], tuple[float, Difference]]:
    """(task, label) -> (learning rate, method minus SFT at that learning rate), where both were run."""
    cells: dict[tuple[str, str, float], Rows] = {}
    for row in rows:
        if row["experiment"] in (experiment, "control") and not _is_plain_sft(row):
            cells.setdefault((row["task"], row["label"], row["lr"]), []).append(row)
    return {
        (task, label): (rate, found)
        for (task, label, rate), ours in cells.items()
        if (found := paired(ours, sft_at(rows, task, rate, experiment), metric)) is not None
    }


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
