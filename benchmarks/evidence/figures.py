"""The figures of docs/evidence-data.md."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from evidence.paired import estimate
from evidence.store import Rows


def _panels(rows: Rows, width: float, height: float) -> tuple[Any, dict[str, Any]]:
    """A figure with one titled panel a task, by task."""
    tasks = list(dict.fromkeys(r["task"] for r in rows))
    figure, axes = plt.subplots(1, len(tasks), figsize=(width * len(tasks), height), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        axis.set_title(task)
    return figure, dict(zip(tasks, axes[0], strict=True))


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_scores(data: Rows, path: Path) -> None:
    """Score of every method with its confidence interval, one panel a task."""
    rows = [r for r in data if r["experiment"] in ("compare-skills", "compare-text")]
    if not rows:
        return
    figure, panels = _panels(rows, 4.2, 6)
    for task, axis in panels.items():
        values: dict[str, list[float]] = defaultdict(list)
        for row in rows:
            if row["task"] == task:
                values[row["label"]].append(row["score"])
        ordered = sorted(values.items(), key=lambda item: sum(item[1]) / len(item[1]))
        for height, (label, scores) in enumerate(ordered):
            found = estimate(scores)
            colour = "tab:red" if label == "SFT" else "tab:blue" if label.startswith("LfU") else "tab:gray"
            axis.errorbar(found.mean, height, xerr=found.half_width, fmt="o", color=colour, capsize=2)
        axis.set_yticks(range(len(ordered)), [label for label, _ in ordered], fontsize=7)
        axis.set_xlabel("score")
        axis.grid(axis="x", alpha=0.3)
    _save(figure, path)


def draw_alpha(data: Rows, path: Path) -> None:
    """In-domain accuracy and retention against alpha."""
    rows = [r for r in data if r["experiment"] == "alpha"]
    if not rows:
        return
    figure, panels = _panels(rows, 5, 3.6)
    for task, axis in panels.items():
        for flavour in ("LfU LoRA", "LfU steering"):
            for metric, style in (("in_domain", "-"), ("retention", "--")):
                points: dict[float, list[float]] = defaultdict(list)
                for row in rows:
                    if row["task"] == task and row["label"].startswith(f"{flavour}, alpha "):
                        points[float(row["label"].rsplit(" ", 1)[1])].append(row[metric])
                alphas = sorted(points)
                found = [estimate(points[a]) for a in alphas]
                axis.errorbar(
                    alphas,
                    [f.mean for f in found],
                    yerr=[f.half_width for f in found],
                    fmt=style,
                    marker="o",
                    capsize=2,
                    color="tab:blue" if flavour == "LfU LoRA" else "tab:orange",
                    label=f"{flavour}, {metric.replace('_', '-')}",
                )
        axis.set_xscale("log")
        axis.set_xlabel("alpha")
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=7)
    _save(figure, path)


def draw_noise(data: Rows, path: Path) -> None:
    """Cosine similarity of hidden states under noise, layer by layer."""
    rows = [r for r in data if r["experiment"] == "noise"]
    if not rows:
        return
    figure, panels = _panels(rows, 5, 3.6)
    for task, axis in panels.items():
        for label in dict.fromkeys(r["label"] for r in rows):
            runs = [r for r in rows if r["task"] == task and r["label"] == label]
            layers = sorted(int(name.split("/")[1]) for name in runs[0] if name.startswith("cosine/"))
            found = [estimate([r[f"cosine/{i}"] for r in runs]) for i in layers]
            axis.errorbar(
                layers, [f.mean for f in found], yerr=[f.half_width for f in found], marker="o", capsize=2, label=label
            )
        axis.set_xlabel("layer")
        axis.set_ylabel("cosine similarity")
        axis.set_xticks(layers)
        axis.grid(alpha=0.3)
    figure.axes[-1].legend(fontsize=6)
    _save(figure, path)
