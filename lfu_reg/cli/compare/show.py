"""The comparison as a table, sample answers and words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, median, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from lfu_reg.cli.compare.curves import cost, forgotten, gaps, per_step
from lfu_reg.cli.compare.plan import Run, best_rate
from lfu_reg.cli.compare.verdict import verdict

Row = Mapping[str, Any]

NOTE = (
    "step: median; x SFT: on the same batches; MB: peak of a step above the weights (on a CPU, what autograd keeps); "
    "tokens and answers right: by greedy decoding, an answer word for word; KL: from the base model, on answers of its "
    "own; forgotten: mean rise of the losses on what was to be kept, or else KL. ±: between seeds."
)


def show(rows: Sequence[Row], base: Row, questions: Sequence[tuple[str, str]], console: Console) -> dict[str, Any]:
    """Everything that is known so far.

    Args:
        rows: of finished runs.
        base: scores of the base model, and its answers.
        questions: those whose answers were kept as samples, with the answers of the data.
        console: to write on.

    Returns:
        what was shown, for JSON.
    """
    base, samples = base["point"], base["samples"]
    lines = verdict(rows, base)
    if rows:
        console.print(_table(rows, base))
        console.print(NOTE, soft_wrap=True)
    shown = _shown(rows, base)
    _show_samples(shown, samples, questions, console)
    warned = sorted({warning for row in rows for warning in row["warnings"]})
    for warning in warned:
        console.print(f"Warning, while training: {warning}", soft_wrap=True)
    diverged = [row["run"] for row in rows if not row["points"]]
    if diverged:
        console.print(f"Diverged, and left out: {', '.join(diverged)}.", soft_wrap=True)
    console.print("\nVerdict: " + "\n  ".join(lines), soft_wrap=True)
    return {
        "verdict": lines,
        "gaps": [gap.as_dict() for gap in gaps(rows, base)],
        "warnings": warned,
        "diverged": diverged,
    }


def _table(rows: Sequence[Row], base: Row) -> Table:
    """A line per setting and scale: SFT's best rate at all scales, and what was trained as it is."""
    table = Table(title="Means over seeds", title_justify="left")
    columns = ["", "seeds", "step", "x SFT", "MB", "held-out loss", "tokens right", "answers right"]
    for name in base["kept"]:
        columns += [f"{name} loss", *(["right"] * _has_answers(base, name))]
    columns += ["KL to base", "forgotten"]
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=number == 0, overflow="fold")
    table.add_row("base model", "", "", "", "", *_scores([base], base), end_section=True)
    best = best_rate(rows)
    settings = {Run.of(row).setting: row for row in rows if row["points"]}
    for name, example in settings.items():
        same = [row for row in rows if Run.of(row).setting == name and row["points"]]
        ratio, peak = fmean(cost(row, rows) for row in same), max(row["peak_mb"] for row in same)
        trained = [f"{len(same)}", f"{median(map(per_step, same)):.2f} s", f"{ratio:.2f}", f"{peak:.0f}"]
        for place in range(len(example["points"]) - 1, -1, -1):
            points = [row["points"][place] for row in same]
            scale = points[0]["scale"]
            if scale == 1:
                table.add_row(name, *trained, *_scores(points, base))
            elif example["step"] is None and example["rate"] == best:
                table.add_row(f"  adapter x {scale:g}", "", "", "", "", *_scores(points, base))
    return table


def _has_answers(base: Row, name: str) -> bool:
    """Whether the base model gives some of the answers of a part; of a text it gives no piece whole."""
    return bool(base["kept"][name]["exact"])


def _scores(points: Sequence[Row], base: Row) -> list[str]:
    def mean(*path: str) -> float:
        return fmean(_at(point, path) for point in points)

    kept = []
    for name in base["kept"]:
        kept += [
            f"{mean('kept', name, 'loss'):.3f}",
            *([f"{mean('kept', name, 'exact'):.2f}"] * _has_answers(base, name)),
        ]
    return [
        _with_spread([point["domain"]["loss"] for point in points]),
        f"{mean('domain', 'token_accuracy'):.2f}",
        f"{mean('domain', 'exact'):.2f}",
        *kept,
        f"{mean('kl'):.3f}",
        _with_spread([forgotten(point, base) for point in points]),
    ]


def _with_spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.3f}" + (f"±{stdev(values):.3f}" if len(values) > 1 else "")


def _at(point: Row, path: Sequence[str]) -> float:
    value: Any = point
    for name in path:
        value = value[name]
    return float(value)


def _shown(rows: Sequence[Row], base: Row) -> dict[str, Row]:
    """The runs whose answers are shown: SFT at its best rate, and LfU's best setting of each kind of step."""
    best = best_rate(rows)
    found = {Run.of(row).setting: row for row in rows if row["step"] is None and row["rate"] == best and row["samples"]}
    kinds: dict[str, Row] = {}
    for gap in gaps(rows, base):
        kinds.setdefault(gap.row["step"], gap.row)
    return found | {Run.of(row).setting: row for row in kinds.values() if row["samples"]}


def _show_samples(
    shown: Mapping[str, Row], base: Sequence[str], questions: Sequence[tuple[str, str]], console: Console
) -> None:
    for place, (question, answer) in enumerate(questions):
        console.print(f"\n{question}\n  data: {answer}\n  base model: {base[place]}", soft_wrap=True)
        for name, row in shown.items():
            console.print(f"  {name}: {row['samples'][place]}", soft_wrap=True)
