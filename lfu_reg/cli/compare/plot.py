"""Learning against forgetting as a picture: SFT's curves over learning rates and scales, and LfU's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from lfu_reg.cli.compare.curves import Point, place
from lfu_reg.cli.compare.plan import Run
from lfu_reg.cli.compare.verdict import mean_place

# Okabe and Ito's palette without black: told apart by readers with any kind of colour vision.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREYS = ("#000000", "#666666", "#aaaaaa")


def draw(rows: Sequence[Mapping[str, Any]], base: Mapping[str, Any], file: Path | IO[bytes]) -> None:
    """Write a PNG: a line per setting from the base model over the scales of its adapter, a small mark per seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5.5), layout="constrained")
    start = place(base, base)
    numbers = {True: 0, False: 0}
    for name, example in {Run.of(row).setting: row for row in rows if row["points"]}.items():
        is_sft = example["step"] is None
        colors = GREYS if is_sft else COLORS
        color = colors[numbers[is_sft] % len(colors)]
        numbers[is_sft] += 1
        scales = [point["scale"] for point in example["points"]]
        line = [start, *(at for scale in scales if (at := mean_place(rows, name, scale, base)) is not None)]
        _line(axes, line, color, name, dashed=is_sft)
        seeds = [place(row["points"][-1], base) for row in rows if Run.of(row).setting == name and row["points"]]
        axes.scatter([x for x, _ in seeds], [y for _, y in seeds], s=14, color=color, alpha=0.4, linewidths=0)
    axes.scatter([start[0]], [start[1]], marker="*", s=160, color="#000000", zorder=4, label="base model")
    axes.axhline(start[1], color="#cccccc", linewidth=0.8, zorder=0)
    axes.set_xlabel("loss on held-out rows, nats per token (less is better)")
    kept = base["kept"]
    axes.set_ylabel(
        f"rise of the loss on {', '.join(kept)}, nats" if kept else "KL to the base model on its own answers, nats"
    )
    axes.set_title(
        "Learning against forgetting: lower left is better; lines are the adapter's scale from 0 to 1", fontsize=11
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(file, dpi=150, format="png")
    pyplot.close(figure)


def _line(axes: Any, line: Sequence[Point], color: str, name: str, *, dashed: bool) -> None:
    style = "--" if dashed else "-"
    axes.plot([x for x, _ in line], [y for _, y in line], style, color=color, linewidth=1.4, marker="o", markersize=3)
    axes.scatter([line[-1][0]], [line[-1][1]], s=70, color=color, marker="s" if dashed else "D", label=name, zorder=3)
