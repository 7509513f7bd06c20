"""Tables of what was measured beside what the paper published."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from paper.data import SETS
from paper.published import ATTACKS, CATEGORIES, FIGURE_5, TIMES, Figures, mean_ranks, published
from paper.settings import Model
from paper.tables import Row, Table

COLUMNS = {"attack": ATTACKS, "variations": ("mean", "sd"), "similarity": ("mean",)}
STANDS_IN = "Llama-3.1-8B"  # whose published numbers stand beside a model that the paper does not have


def columns_of(key: str, table: Table) -> tuple[str, ...]:
    """The figures that a table has."""
    if table.measured != "tasks":
        return COLUMNS[table.measured]
    return (*CATEGORIES, *(("rank",) if key in "12" else ()), *(TIMES if key == "3" else ()))


def page(key: str, table: Table, model: Model, data: str, measured: list[tuple[Row, Figures]], notes: str = "") -> str:
    """Markdown: measured, published, and their difference for every figure of every row.

    Args:
        key: of the table.
        table: its declaration.
        model: that was run.
        data: the training set.
        measured: rows and their figures, with "ms_per_step" among them.
        notes: a paragraph under the heading.
    """
    name = SETS[data][0] if data in SETS else data
    known = published()
    beside = next(
        (n for n in (model.name, STANDS_IN) if (key[:2], n, name) in known or (key[:1], n, name) in known), ""
    )
    rows = known.get((key, beside, name), {})
    ranked = _with_ranks(measured) if key in "12" else measured
    columns = columns_of(key, table)
    heading = f"## {'Table ' * (not key.startswith('figure'))}{key}: {table.what}, {model.name or model.hub} on {name}"
    lines = [heading, "", *([notes, ""] if notes else [])]
    if rows:
        other = "" if beside == model.name else f" of **another model** ({beside}), whose differences say nothing"
        lines += [f"Each cell: measured / published (difference). Published numbers are those{other}.", ""]
    elif key == "figure5":
        lines += ["The paper has a single number for this, which stands below the table.", ""]
    else:
        lines += ["The paper's main part has no numbers for this model and these data.", ""]
    lines += [f"| method | setting | {' | '.join(columns)} |", f"|---|---|{'---|' * len(columns)}"]
    for row, figures in ranked:
        beside_it = rows.get((row.label, row.setting), {})
        cells = [cell(figures.get(c), beside_it.get(c)) for c in columns]
        label = row.label.replace("|", r"\|")
        lines.append(f"| {label} | {row.setting} | {' | '.join(cells)} |")
    return "\n".join([*lines, *_spread_of_sft(ranked, columns), *_against_sft(key, ranked), ""])


def reduced(options: dict[str, Any]) -> list[str]:
    """What a run at less than the paper's size has to say of itself.

    Args:
        options: of the command line.
    """
    sizes = [f"--{name} {options[name]}" for name in ("limit", "examples", "steps") if options[name] is not None]
    sizes += ["--only-tasks"] * bool(options["only_tasks"]) + ["--tasks local"] * (options["tasks"] == "local")
    if not sizes:
        return []
    return [f"**Reduced size ({', '.join(sizes)}): no difference to a published figure here says anything.**"]


def cell(measured: float | None, told: float | None) -> str:
    """One figure: measured / published (difference)."""
    here = (
        "n/a" if measured is None else f"{measured:.1f}" if abs(measured) >= 1 or measured == 0 else f"{measured:.3f}"
    )
    if told is None:
        return here
    return f"{here} / {told:.1f}" + ("" if measured is None else f" ({measured - told:+.1f})")


def _with_ranks(measured: list[tuple[Row, Figures]]) -> list[tuple[Row, Figures]]:
    """Ranks among the table's own tuned rows."""
    tuned = {row.label: figures for row, figures in measured if row.method != "vanilla" and not row.setting}
    ranks = mean_ranks(tuned)
    return [
        (row, {**figures, "rank": ranks[row.label]} if row.label in ranks and not row.setting else figures)
        for row, figures in measured
    ]


def _spread_of_sft(measured: Iterable[tuple[Row, Figures]], columns: tuple[str, ...]) -> list[str]:
    """Standard deviation over SFT's seeds at the protocol's learning rate: smaller differences decide nothing."""
    runs = [f for row, f in measured if row.method == "sft" and row.lr_factor == 1.0]
    if len(runs) < 2:
        return []
    spread = {c: [f[c] for f in runs if c in f] for c in columns if c != "rank"}
    told = ", ".join(f"{c} {statistics.stdev(values):.2f}" for c, values in spread.items() if len(values) > 1)
    return ["", f"Standard deviation of SFT over {len(runs)} seeds: {told}."]


def _against_sft(key: str, measured: list[tuple[Row, Figures]]) -> list[str]:
    """Figure 5's one number: the standard deviation over prompts, relative to SFT's."""
    if key != "figure5":
        return []
    sd = {row.label: figures.get("sd") for row, figures in measured}
    lfu, sft = sd.get("LfU"), sd.get("SFT")
    change = 100 * (lfu / sft - 1) if lfu is not None and sft else None
    return ["", f"Standard deviation of LfU relative to SFT: {cell(change, FIGURE_5)} percent."]
