"""Turns results into a table, a JSON file and a plot."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

# Okabe and Ito's palette: told apart by readers with any kind of colour vision.
COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")


def summarize(runs: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """regime -> method -> metric -> mean and standard deviation over seeds."""
    summary: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for run in runs:
        of_regime = summary.setdefault(run["regime"], {})
        if run["method"] not in of_regime:
            same = [r for r in runs if (r["regime"], r["method"]) == (run["regime"], run["method"])]
            of_regime[run["method"]] = {key: _mean_and_std([r[key] for r in same]) for key in _METRICS}
    return summary


def paired_differences(runs: list[dict[str, Any]], baseline: str) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """regime -> method -> metric -> mean and standard deviation over seeds of the difference to the baseline."""
    of_baseline = {(run["regime"], run["seed"]): run for run in runs if run["method"] == baseline}
    differences = [
        {**run, **{key: run[key] - of_baseline[run["regime"], run["seed"]][key] for key in _METRICS}}
        for run in runs
        if run["method"] != baseline and of_baseline
    ]
    return summarize(differences)


_METRICS = ("in_domain", "in_domain_loss", "retention", "variation_mean", "variation_spread", "final_sft_loss")


def _mean_and_std(values: list[float]) -> dict[str, float]:
    spread = statistics.stdev(values) if len(values) > 1 else float("nan")
    return {"mean": statistics.fmean(values), "std": spread}


def print_tables(results: dict[str, Any], console: Console) -> None:
    """One table per regime, the same costs in each, with the differences to plain fine-tuning below."""
    for regime, methods in results["summary"].items():
        console.print()
        console.print(_table(results, regime, methods))
        for line in _difference_lines(results, regime):
            console.print(f"  {line}", markup=False)
    console.print()
    for note in results["notes"]:
        console.print(f"  {note}", style="dim", highlight=False)


def _table(results: dict[str, Any], regime: str, methods: dict[str, Any]) -> Table:
    names = results["metric_names"]
    seeds = len(results["settings"]["seeds"])
    table = Table(title=f"{regime}, mean ± std over {seeds} seed{'s' * (seeds != 1)}", title_justify="left")
    table.add_column("method")
    headers = (
        "step\n[ms]",
        "× SFT",
        "memory\n[MB]",
        f"in-domain\n{names['in_domain']}",
        f"{names['retention_of']}\n{names['retention']}",
        f"prompt variations\n{names['in_domain']}",
        "spread over\nvariations",
    )
    for header in headers:
        table.add_column(header, justify="right")
    before = results["before"]
    table.add_row(
        "before",
        *("", "", ""),
        *(f"{before[key]:.3f}" for key in ("in_domain", "retention", "variation_mean", "variation_spread")),
        end_section=True,
    )
    for key, metrics in methods.items():
        cost = results["cost"][key]
        table.add_row(
            results["methods"][key]["label"],
            f"{cost['step_ms']:.1f}",
            f"{cost['ratio']:.2f}",
            f"{cost['peak_bytes'] / 1e6:.1f}",
            *(_cell(metrics[m]) for m in ("in_domain", "retention", "variation_mean", "variation_spread")),
        )
    return table


def _difference_lines(results: dict[str, Any], regime: str) -> list[str]:
    names = results["metric_names"]
    shown = {"in_domain": "in-domain", "retention": names["retention_of"], "variation_spread": "spread"}
    return [
        f"{results['methods'][key]['label']} minus SFT, same seeds: "
        + ", ".join(f"{name} {_cell(metrics[metric], sign='+')}" for metric, name in shown.items())
        for key, metrics in results["minus_sft"].get(regime, {}).items()
    ]


def _cell(value: dict[str, float], sign: str = "") -> str:
    mean = f"{value['mean']:{sign}.3f}"
    return mean if math.isnan(value["std"]) else f"{mean} ± {value['std']:.3f}"  # no std from one seed


def write_json(results: dict[str, Any], path: Path) -> None:
    """Everything that was measured."""
    path.write_text(json.dumps(_finite(results), indent=2) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    """JSON has no NaN: missing numbers are null."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_plot(results: dict[str, Any], path: Path) -> None:
    """Accuracy, retention and spread per method and regime, every seed as a dot; and the costs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names, regimes = results["metric_names"], list(results["summary"])
    panels = (
        ("in_domain", f"In-domain {names['in_domain']}"),
        ("retention", f"{names['retention_of'].capitalize()}: {names['retention']}"),
        ("variation_spread", "Spread over prompt variations (std)"),
    )
    figure, grid = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    axes = list(grid.flat)
    for axis, (metric, title) in zip(axes, panels, strict=False):
        _plot_metric(axis, results, regimes, metric)
        axis.set_title(title, fontsize=11)
    _plot_costs(axes[-1], results)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(results["description"], fontsize=12)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _plot_metric(axis: Any, results: dict[str, Any], regimes: list[str], metric: str) -> None:
    keys = list(results["methods"])
    for index, regime in enumerate(regimes):
        color, shift = COLORS[1 + index], 0.26 * (index - (len(regimes) - 1) / 2)
        summary = results["summary"][regime]
        means = [summary[key][metric]["mean"] for key in keys]
        spreads = [summary[key][metric]["std"] for key in keys]
        places = [place + shift for place in range(len(keys))]
        errors = None if any(map(math.isnan, spreads)) else spreads
        axis.errorbar(
            places, means, errors, fmt="o", ms=7, capsize=4, color=color, label=f"{regime}: mean ± std, seeds as dots"
        )
        for run in (r for r in results["runs"] if r["regime"] == regime):
            axis.plot(keys.index(run["method"]) + shift + 0.09, run[metric], ".", color=color, alpha=0.45)
    axis.axhline(results["before"][metric], color="gray", ls=":", lw=1.2, label="before fine-tuning")
    _name_methods(axis, results)


def _plot_costs(axis: Any, results: dict[str, Any]) -> None:
    costs = list(results["cost"].values())
    baseline = results["cost"].get("sft", costs[0])["peak_bytes"]
    times, memory = [c["ratio"] for c in costs], [c["peak_bytes"] / baseline for c in costs]
    for shift, values, color, label in ((-0.19, times, COLORS[4], "step time"), (0.19, memory, COLORS[5], "memory")):
        bars = axis.bar([i + shift for i in range(len(values))], values, 0.36, color=color, label=label)
        axis.bar_label(bars, fmt="%.2f", fontsize=8)
    axis.axhline(1.0, color="gray", ls=":", lw=1.2)
    axis.margins(y=0.2)
    axis.legend(frameon=False, fontsize=9, loc="upper left", ncols=2)
    axis.set_title("Cost of a step, × SFT", fontsize=11)
    _name_methods(axis, results)


def _name_methods(axis: Any, results: dict[str, Any]) -> None:
    labels = [method["label"].replace(" (", "\n(") for method in results["methods"].values()]
    labels = [label.replace("relative ", "relative\n") for label in labels]
    axis.set_xticks(range(len(labels)), labels, fontsize=9)
    axis.set_xlim(-0.6, len(labels) - 0.4)
    axis.grid(axis="y", alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
