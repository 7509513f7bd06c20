"""The figure: domain loss against what is forgotten, SFT's curve and every method, one panel a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from evidence.store import Rows

from lfu_reg.cli.compare.plot import COLORS
from study.analysis import Judged
from study.cells import MAIN
from study.tasks import HEADLINE, LARGE

TITLES = {HEADLINE: "2.2 M parameters, GSM8K, 64 examples", LARGE: "SmolLM2-135M, SVAMP, 64 examples"}
MARKS = "osD^vP*X<>"


def draw(rows: Rows, path: Path) -> None:
    """Writes it."""
    tasks = [task for task in TITLES if any(row["task"] == task and row["experiment"] != "base" for row in rows)]
    figure, axes = plt.subplots(1, len(tasks), figsize=(5.6 * len(tasks), 4.6), squeeze=False, facecolor="white")
    for axis, task in zip(axes[0], tasks, strict=True):
        _panel(axis, Judged.of(rows, task), TITLES[task])
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(axis: Any, judged: Judged, title: str) -> None:
    start = judged.origin
    ends = []
    for number, rate in enumerate(sorted({row["lr"] for row in judged.sft})):
        mine = [row for row in judged.sft if row["lr"] == rate]
        line = [start, *(judged.means(mine, point["scale"]) for point in mine[0]["points"])]
        label = "SFT, adapter scaled by .25 to 1" if number == 0 else None
        axis.plot(*zip(*line, strict=True), "--", color="0.6", linewidth=1, marker=".", label=label)
        ends.append(line[-1])
        axis.annotate(f"{rate:g}", line[-1], fontsize=7, color="0.3", xytext=(-4, 5), textcoords="offset points")
    axis.plot(*zip(*ends, strict=True), "-", color="black", marker="s", markersize=4, label="SFT over learning rates")
    labels = [label for label in dict.fromkeys(cell[0] for cell in judged.cells()) if label != "SFT"]
    others = [label for label in labels if label not in MAIN]
    for label in labels:
        cells = [cell for cell in judged.cells() if cell[0] == label]
        places = [judged.means(judged.of_cell(cell)) for cell in cells]
        if label in MAIN:
            color = COLORS[MAIN.index(label)]
            rate = judged.rates.get(label, cells[0][2])
            strengths = [place for place, cell in zip(places, cells, strict=True) if cell[2] == rate]
            axis.plot(*zip(*sorted(strengths), strict=True), "-", color=color, linewidth=1.2)
            judged_here = judged.means(judged.tuned(label) or judged.first(label))
            axis.plot(*judged_here, "o", color=color, markersize=8, label=label, zorder=4)
            axis.plot(*zip(*places, strict=True), ".", color=color)
        else:
            mark = MARKS[others.index(label) % len(MARKS)]
            axis.plot(*places[0], mark, markerfacecolor="none", color=COLORS[3 + others.index(label) % 3], label=label)
    _frame(axis, start[0], 1.5 * max(forgot for _, forgot in ends))
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("loss in the domain, held out (nats per token)")
    axis.set_ylabel("forgotten: rise of the losses elsewhere (nats)")
    axis.axhline(0, color="0.85", linewidth=0.8, zorder=0)
    axis.legend(fontsize=7, frameon=False, loc="upper right", ncols=2)
    axis.spines[["top", "right"]].set_visible(False)


def _frame(axis: Any, base: float, highest: float) -> None:
    """What is far worse than SFT in either would squeeze the rest: it is named at the edge."""
    beyond = []
    for line in axis.lines:
        x, y = line.get_xdata()[0], line.get_ydata()[0]
        label = line.get_label()
        if not label.startswith("_") and (x > 1.02 * base or y > highest):
            beyond.append(f"{label} ({x:.2f}, {y:.2f})")
            line.set_label(None)
    if beyond:
        axis.text(0.02, 0.02, "off the picture: " + ", ".join(beyond), fontsize=7, transform=axis.transAxes)
    axis.set_xlim(None, 1.02 * base)
    axis.set_ylim(-0.08 * highest, highest)
