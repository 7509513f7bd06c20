"""The study's tables."""

from __future__ import annotations

import json
from statistics import median

from evidence.paired import Estimate, estimate
from evidence.store import Rows
from strength.page import table

from lfu_reg.cli.compare.curves import place
from study.analysis import Judged, answers
from study.cells import ACCURACY, base_of_rows
from study.tasks import HEADLINE, LARGE, LARGE_OTHERS, OTHERS

NAMES = {HEADLINE: "2.2 M, GSM8K, 64 examples", LARGE: "135 M, SVAMP, 64 examples"}
NAMES |= {
    task: f"135 M, {name}, {size} examples"
    for task, name, size in zip(LARGE_OTHERS, ("GSM8K", "SVAMP", "Dolly", "BoolQ"), (64, 256, 64, 64), strict=True)
}
QUESTIONS = {"piqa": "PIQA", "winogrande": "WinoGrande"}


def name_of(task: str) -> str:
    """What a reader calls a task."""
    return NAMES.get(task, f"2.2 M, {task.removeprefix('study/')}")


def shown(found: Estimate | None) -> str:
    """A signed mean with its interval, and of how many seeds."""
    if found is None:
        return "not run"
    if found.count < 2:
        return f"{found.mean:+.3f} (1)"
    digits = 5 if 0 < found.half_width < 0.001 else 3
    return f"{found.mean:+.{digits}f} ± {found.half_width:.{digits}f} ({found.count})"


def gap(judged: Judged, rows: Rows, **how: float | bool) -> Estimate | None:
    """Of a method's rows to SFT's curve; None where nothing has run."""
    values = list(judged.gaps(rows, **how).values())  # type: ignore[arg-type]
    return estimate(values) if values else None


def summary(rows: Rows) -> str:
    """2.2 M: every method at the cell that tuning chose, lowest domain loss + forgotten first."""
    small = Judged.of(rows, HEADLINE)
    lines = [[*line, _if_run(gap(small, mine, scale=0.75))] for mine, line in _lines(small)]
    return table([*_HEAD, "the same, scaled by .75"], lines)


def large(rows: Rows) -> str:
    """The same of 135 M, with the rates, which are each method's own."""
    lines = [[*line, f"{mine[0]['lr']:g}"] for mine, line in _lines(Judged.of(rows, LARGE))]
    return table([*_HEAD, "rate"], lines)


_HEAD = ["method", "time", "domain loss", "forgotten", "gap to SFT's rates", "gap to rates and scales"]


def _lines(judged: Judged) -> list[tuple[Rows, list[str]]]:
    """The rows of each method where tuning chose it, and how it did; lowest domain loss + forgotten first."""
    labels = dict.fromkeys(cell[0] for cell in judged.cells())
    cells = {label: mine for label in labels if (mine := judged.tuned(label))}
    lines = []
    for label, mine in sorted(cells.items(), key=lambda item: sum(judged.means(item[1]))):
        line = [
            f"**{label}**" if label.startswith(("LfU", "SFT")) else label,
            f"{_seconds(mine) / _seconds(judged.sft):.1f}",
            *(f"{value:.3f}" for value in judged.means(mine)),
            "" if label == "SFT" else shown(gap(judged, mine, by_scale=False)),
            shown(gap(judged, mine)),
        ]
        lines.append((mine, line))
    return lines


def accuracy(rows: Rows) -> str:
    """135 M: shares of right answers, and how much they differ from the base model's, seed by seed."""
    mine = [row for row in rows if row["experiment"] == ACCURACY]
    start = next(row["ranked"] for row in mine if row["method"] == "base")
    lines = [["base model", *(f"{start[name]:.3f}" for name in QUESTIONS)]]
    for label in dict.fromkeys(row["label"] for row in mine if row["method"] != "base"):
        found = [row["ranked"] for row in mine if row["label"] == label]
        lines.append([label, *(shown(estimate([one[name] - start[name] for one in found])) for name in QUESTIONS)])
    return table(["", *QUESTIONS.values()], lines)


def _seconds(rows: Rows) -> float:
    return median(row["train_seconds"] for row in rows)


def _if_run(found: Estimate | None) -> str:
    return shown(found) if found else ""


def hypotheses(rows: Rows) -> str:
    """Every hypothesis with what was found."""
    return table(
        ["", "claim", "where", "difference (seeds)", "verdict"],
        [[a.number, a.claim, name_of(a.where), shown(a.found), a.verdict] for a in answers(rows)],
    )


def places(rows: Rows) -> str:
    """Every cell that ran on test data: where it is, by task."""
    lines = []
    for task in (HEADLINE, LARGE, *LARGE_OTHERS, *OTHERS):
        if not any(row["task"] == task and row["split"] == "test" and row["method"] != "base" for row in rows):
            continue
        judged = Judged.of(rows, task)
        x, y = judged.origin
        lines.append([name_of(task), "base model", "", "", f"{x:.3f}", f"{y:.3f}", "", "", ""])
        for cell in judged.cells():
            mine = judged.of_cell(cell)
            for point in mine[0]["points"]:
                scale = point["scale"]
                x, y = judged.means(mine, scale)
                points = [p for row in mine for p in row["points"] if p["scale"] == scale]
                kl = sum(p["kl"] for p in points) / len(points)
                away = "" if cell[0] == "SFT" else shown(gap(judged, mine, scale=scale))
                setting = ", ".join(f"{k} {v}" for k, v in json.loads(cell[1]).items() if k != "flavour")
                lines.append(
                    [
                        name_of(task),
                        f"{cell[0]}{f', {setting}' if setting else ''}",
                        f"{cell[2]:g}",
                        f"{scale:g}",
                        f"{x:.3f}",
                        f"{y:.3f}",
                        f"{kl:.3f}",
                        str(len(mine)),
                        away,
                    ]
                )
    head = ["task", "method", "rate", "scale", "domain loss", "forgotten", "KL to base", "seeds", "gap to SFT's curve"]
    return table(head, lines)


def parts(rows: Rows) -> str:
    """What was forgotten of what: the rise of each loss, adapters as trained."""
    lines = []
    for task in (HEADLINE, LARGE):
        judged = Judged.of(rows, task)
        kept = judged.start["kept"]
        for cell in judged.cells():
            mine = judged.of_cell(cell)
            rises = {
                name: sum(row["points"][-1]["kept"][name]["loss"] - kept[name]["loss"] for row in mine) / len(mine)
                for name in kept
            }
            words = ", ".join(f"{name} {value:+.3f}" for name, value in rises.items())
            setting = json.loads(cell[1])
            strength = next((f" {v}" for k, v in setting.items() if k != "flavour"), "")
            more = ""
            if "cosine" in mine[0]:
                more = " / ".join(
                    f"{sum(row[key] for row in mine) / len(mine):.3f}" for key in ("variations", "cosine")
                )
            lines.append([name_of(task), f"{cell[0]}{strength}", f"{cell[2]:g}", words, more])
    return table(["task", "method", "rate", "rise of the loss on", "other wordings / cosine under noise"], lines)


def tuned(rows: Rows) -> str:
    """The validation scores that rates were chosen by."""
    lines = []
    for row in rows:
        if row["experiment"] == "tune":
            x, y = place(row["points"][-1], base_of_rows(rows, row["task"], "validation"))
            lines.append([name_of(row["task"]), row["label"], f"{row['lr']:g}", f"{x:.3f}", f"{y:.3f}", f"{x + y:.3f}"])
    return table(["task", "method", "rate", "domain loss", "forgotten", "sum"], lines)
