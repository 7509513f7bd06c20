"""Writes the study's tables, sentences and figure into the pages: `python -m study.page` in benchmarks/."""

from __future__ import annotations

import json
from functools import partial
from statistics import median
from textwrap import fill

from evidence import store
from evidence.paired import Estimate, estimate
from evidence.store import ROOT, Rows
from strength.page import with_tables

from study.analysis import Judged, answers
from study.cells import MAIN, STAGES, base_of_rows, chosen
from study.tasks import HEADLINE, LARGE, OTHERS

RESULTS = store.RESULTS.with_name("study.jsonl")
PAGES = {name: ROOT / name for name in ("README.md", "docs/evidence.md", "docs/study-data.md")}
FIGURE = ROOT / "docs" / "figures" / "study.png"
NAMES = {HEADLINE: "2.2 M, GSM8K, 64 examples", LARGE: "135 M, SVAMP, 64 examples"}


def name_of(task: str) -> str:
    """What a reader calls a task."""
    return NAMES.get(task, f"2.2 M, {task.removeprefix('study/')}")


def shown(found: Estimate | None) -> str:
    """A signed mean with its interval, and of how many seeds."""
    if found is None:
        return "not run"
    if found.count < 2:
        return f"{found.mean:+.3f} (1)"
    digits = 3 if found.half_width >= 0.001 else 5
    return f"{found.mean:+.{digits}f} ± {found.half_width:.{digits}f} ({found.count})"


def _table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in rows)


def _gap(judged: Judged, rows: Rows, **how: float | bool) -> Estimate | None:
    values = list(judged.gaps(rows, **how).values())  # type: ignore[arg-type]
    return estimate(values) if values else None


def _tuned_sft(rows: Rows, task: str) -> Rows:
    """SFT at the rate that tuning chose."""
    rate = chosen(rows, task)["SFT"].lr
    return [row for row in Judged.of(rows, task).sft if row["lr"] == rate]


def summary(rows: Rows) -> str:
    """Every method at the cell that tuning chose, lowest domain loss + forgotten first, on both models."""
    small, large = Judged.of(rows, HEADLINE), Judged.of(rows, LARGE)
    labels = [label for label in dict.fromkeys(cell[0] for cell in small.cells()) if label != "SFT"]
    cells = {"SFT": (_tuned_sft(rows, HEADLINE), _tuned_sft(rows, LARGE))}
    cells |= {label: (small.first(label), large.first(label)) for label in labels}
    lines = []
    for label, (mine, theirs) in sorted(cells.items(), key=lambda item: sum(small.means(item[1][0]))):
        lines.append(
            [
                f"**{label}**" if label.startswith(("LfU", "SFT")) else label,
                f"{_seconds(mine) / _seconds(small.sft):.1f}",
                *(f"{value:.3f}" for value in small.means(mine)),
                "" if label == "SFT" else shown(_gap(small, mine, by_scale=False)),
                shown(_gap(small, mine)),
                _if_run(_gap(small, mine, scale=0.75)),
                _if_run(_gap(large, theirs)),
            ]
        )
    gaps = [
        "gap to SFT's rates",
        "gap to rates and scales",
        "the same, scaled by .75",
        "135 M: gap to rates and scales",
    ]
    return _table(["method", "time", "domain loss", "forgotten", *gaps], lines)


def _seconds(rows: Rows) -> float:
    return median(row["train_seconds"] for row in rows)


def _if_run(found: Estimate | None) -> str:
    return shown(found) if found else ""


def hypotheses(rows: Rows) -> str:
    """Every hypothesis with what was found."""
    return _table(
        ["", "claim", "where", "difference (seeds)", "verdict"],
        [[a.number, a.claim, name_of(a.where), shown(a.found), a.verdict] for a in answers(rows)],
    )


def places(rows: Rows) -> str:
    """Every cell that ran on test data: where it is, by task."""
    lines = []
    for task in (HEADLINE, LARGE, *OTHERS):
        if not any(row["task"] == task and row["split"] == "test" and row["method"] != "base" for row in rows):
            continue
        judged = Judged.of(rows, task)
        x, y = judged.means([{"points": [judged.start]}], 0.0)
        lines.append([name_of(task), "base model", "", "", f"{x:.3f}", f"{y:.3f}", "", "", ""])
        for cell in judged.cells():
            mine = judged.of_cell(cell)
            for point in mine[0]["points"]:
                scale = point["scale"]
                x, y = judged.means(mine, scale)
                points = [p for row in mine for p in row["points"] if p["scale"] == scale]
                kl = sum(p["kl"] for p in points) / len(points)
                gap = "" if cell[0] == "SFT" else shown(_gap(judged, mine, scale=scale))
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
                        gap,
                    ]
                )
    head = ["task", "method", "rate", "scale", "domain loss", "forgotten", "KL to base", "seeds", "gap to SFT's curve"]
    return _table(head, lines)


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
    return _table(["task", "method", "rate", "rise of the loss on", "other wordings / cosine under noise"], lines)


def tuned(rows: Rows) -> str:
    """The validation scores that rates were chosen by."""
    lines = []
    for row in rows:
        if row["experiment"] == "tune":
            start = base_of_rows(rows, row["task"], "validation")
            x, y = Judged([], start).means([row])
            lines.append([name_of(row["task"]), row["label"], f"{row['lr']:g}", f"{x:.3f}", f"{y:.3f}", f"{x + y:.3f}"])
    return _table(["task", "method", "rate", "domain loss", "forgotten", "sum"], lines)


def provenance(rows: Rows) -> str:
    """Where the numbers come from, and what was planned and not reached."""
    done = {store.spec_of(row).key() for row in rows}
    planned = {name: stage(rows) for name, stage in STAGES.items()}
    counts = ", ".join(
        f"{name} {sum(s.key() in done for s in specs)} of {len(specs)}" for name, specs in planned.items()
    )
    commits = ", ".join(dict.fromkeys(row["benchmarks"] for row in rows))
    commands = "; ".join(f"`{command}`" for command in dict.fromkeys(row["command"] for row in rows))
    hours = sum(row["seconds"] for row in rows) / 3600
    first = rows[0]
    return (
        f"{len(rows)} runs in `benchmarks/results/study.jsonl`, {hours:.1f} core-hours. Planned runs that were reached: {counts} "
        f"(of the other tasks, only those whose rates were tuned are planned yet).\n\nCommits {commits}; {commands}; torch {first['torch']}, "
        f"transformers {first['transformers']}, peft {first['peft']}, python {first['python']}, {first['hardware']}. Every row has all of these, "
        "its task, method, settings, rate, seed and split, and the scores at every scale; `python -m study` carries out what is missing."
    )


def _against(found: Estimate | None) -> str:
    """`0.012 ± 0.008 nats less`, where the interval has no zero in it."""
    if found is None:
        return "has not run"
    words = "less" if found.mean > 0 else "more"
    certain = found.count > 1 and abs(found.mean) > found.half_width
    interval = f" ± {found.half_width:.3f}" if found.count > 1 else ""
    seeds = f"{found.count} seed{'s' * (found.count > 1)}"
    return f"{abs(found.mean):.3f}{interval} nats {words} ({seeds}{'' if certain else ', may be chance'})"


def _regime(rows: Rows, task: str) -> tuple[float, float]:
    """What SFT gains in the domain at the rate that tuning chose, and what it forgets."""
    judged = Judged.of(rows, task)
    loss, forgot = judged.means(_tuned_sft(rows, task))
    return judged.means([{"points": [judged.start]}], 0.0)[0] - loss, forgot


def short(rows: Rows) -> str:
    """One sentence."""
    small = Judged.of(rows, HEADLINE)
    lora, steering = (_gap(small, small.first(label)) for label in MAIN[:2])
    rates = _gap(small, small.first("LfU steering"), by_scale=False)
    return (
        "at equal loss in the domain (64 examples of GSM8K, 2.2 M parameters) LfU with steering vectors forgets "
        f"{_against(rates)} than SFT at other learning rates, and {_against(steering)} than SFT whose adapter may also be "
        f"scaled after training, which costs nothing; with LoRA {_against(lora)}."
    )


def readme(rows: Rows) -> str:
    """A few lines."""
    small, large = Judged.of(rows, HEADLINE), Judged.of(rows, LARGE)
    big, kl = _gap(large, large.first("LfU LoRA")), _gap(small, small.first("KL to base"))
    sentence = short(rows)
    words = (
        f"{sentence[0].upper()}{sentence[1:]} A KL penalty to the base model forgets {_against(kl)} than that. On "
        f"SmolLM2-135M (64 examples of SVAMP) LfU with LoRA forgets {_against(big)}, where tuned SFT forgets "
        f"{_regime(rows, LARGE)[1]:.3f} in all. [The study, when to use LfU and when something cheaper](docs/evidence.md)."
    )
    return fill(words, 150, break_long_words=False, break_on_hyphens=False)


def regimes(rows: Rows) -> str:
    """How much SFT forgets where it is at its best."""
    lines = []
    for task in (HEADLINE, LARGE):
        gained, lost = _regime(rows, task)
        rate = chosen(rows, task)["SFT"].lr
        lines.append(
            f"* {name_of(task)}: at rate {rate:g} it gains {gained:.3f} nats in the domain and forgets {lost:.3f}."
        )
    return "\n".join(lines)


TABLES = {
    "study: summary": summary,
    "study: hypotheses": hypotheses,
    "study: places": places,
    "study: parts": parts,
    "study: tuned": tuned,
    "study: provenance": provenance,
    "study: readme": readme,
    "study: regimes": regimes,
}


def filled(text: str, rows: Rows) -> str:
    """A page with all tables that it has marks for made anew."""
    wanted = {name: make for name, make in TABLES.items() if f"<!-- {name} -->" in text}
    return with_tables(text, {name: partial(make, rows) for name, make in wanted.items()})


def main() -> None:
    """Pages and figure."""
    from study.figure import draw

    rows = store.rows(RESULTS)
    for page in PAGES.values():
        page.write_text(filled(page.read_text(encoding="utf-8"), rows), encoding="utf-8")
    draw(rows, FIGURE)


if __name__ == "__main__":
    main()
