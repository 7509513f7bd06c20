"""Bars of benchmarks/results/kernel_cpu.csv: time of each provider as a ratio to ours."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any


def plot(source: Path, target: Path) -> None:
    """One panel per mode; groups are shapes, bars are providers, the line at 1 is ours."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with source.open(newline="") as file:
        rows = list(csv.DictReader(file))
    modes, cases = ("forward", "backward", "both"), _distinct(rows, _case)
    names = _distinct(rows, lambda r: r["provider"])
    base = "twin"
    figure, axes = plt.subplots(len(modes), 1, figsize=(13, 10), sharex=True)
    others = [name for name in names if name != base]
    for axis, mode in zip(axes, modes, strict=True):
        at = {(_case(r), r["provider"]): float(r["median_us"]) for r in rows if r["mode"] == mode}
        width = 0.85 / len(others)
        for n, name in enumerate(others):
            heights = [at[case, name] / at[case, base] for case in cases]
            axis.bar([c + (n + 0.5) * width - 0.425 for c in range(len(cases))], heights, width, label=name)
        axis.axhline(1, color="black", linewidth=1)
        axis.set_yscale("log")
        axis.set_ylabel(f"{mode}: time / {base}")
    axes[0].legend(ncol=len(others), fontsize=8)
    axes[-1].set_xticks(range(len(cases)), cases, fontsize=7)
    about = rows[0]
    axes[0].set_title(
        f"{about['device']}, torch {about['torch']}, {about['date']}; above 1: slower than {base}", fontsize=9
    )
    figure.tight_layout()
    figure.savefig(target, dpi=110)


def _case(row: dict[str, str]) -> str:
    part = "" if row["selected"] == "1.0" else f"\n{row['selected']} selected"
    return f"{row['layers']}x{row['tokens']}x{row['hidden']}\n{row['dtype']}{part}"


def _distinct(rows: list[dict[str, str]], key: Any) -> list[str]:
    return list(dict.fromkeys(key(row) for row in rows))
