"""The table of a comparison, as text: what each setting costs, learns and forgets, means over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, median, stdev
from typing import Any, NamedTuple

from lfu_reg.cli.compare.curves import cost, forgotten, per_step
from lfu_reg.cli.compare.plan import Run, best_rate

Row = Mapping[str, Any]

TITLE = "Means over seeds"
NOTE = (
    "step: median; x SFT: on the same batches; MB: peak of a step above the weights (on a CPU, what autograd keeps); "
    "tokens and answers right: by greedy decoding, an answer word for word; KL: from the base model, on answers of its "
    "own; forgotten: mean rise of the losses on what was to be kept, or else KL. ±: between seeds."
)


class Means(NamedTuple):
    """Headings, and lines of as many cells, the first of which is a name; the first line is the base model's."""

    columns: list[str]
    lines: list[list[str]]


def means_of(rows: Sequence[Row], base: Row) -> Means:
    """A line per setting and scale: SFT's best rate at all scales, and what was trained as it is."""
    columns = ["", "seeds", "step", "x SFT", "MB", "held-out loss", "tokens right", "answers right"]
    for name in base["kept"]:
        columns += [f"{name} loss", *(["right"] * _has_answers(base, name))]
    columns += ["KL to base", "forgotten"]
    lines = [["base model", "", "", "", "", *_scores([base], base)]]
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
                lines.append([name, *trained, *_scores(points, base)])
            elif example["step"] is None and example["rate"] == best:
                lines.append([f"  adapter x {scale:g}", "", "", "", "", *_scores(points, base)])
    return Means(columns, lines)


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
