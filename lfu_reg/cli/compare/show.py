"""The comparison as a table, sample answers and words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from lfu_reg.cli.compare.curves import gaps
from lfu_reg.cli.compare.means import NOTE, TITLE, means_of
from lfu_reg.cli.compare.plan import Run, best_rate
from lfu_reg.cli.compare.verdict import verdict

Row = Mapping[str, Any]


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
    shown = shown_runs(rows, base)
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
    means = means_of(rows, base)
    table = Table(title=TITLE, title_justify="left")
    for number, column in enumerate(means.columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=number == 0, overflow="fold")
    for number, line in enumerate(means.lines):
        table.add_row(*line, end_section=number == 0)
    return table


def shown_runs(rows: Sequence[Row], base: Row) -> dict[str, Row]:
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
