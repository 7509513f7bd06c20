"""Writes docs/evidence-data.md and its figures from the results: `python -m evidence.report` in benchmarks/."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path

from evidence.control import COMPARED, at_equal_rate, sft_at, table
from evidence.experiments import EXPERIMENTS, chosen
from evidence.figures import draw_alpha, draw_noise, draw_scores
from evidence.paired import estimate, paired
from evidence.store import RESULTS, ROOT, Rows, rows
from evidence.verdicts import answers

PAGE = ROOT / "docs" / "evidence-data.md"
FIGURES = ROOT / "docs" / "figures"
PARTS = Path(__file__).parent
COLUMNS = {
    "in_domain": "in-domain",
    "variation_mean": "variations",
    "variation_spread": "spread",
    "retention": "retention",
    "score": "score",
}
CONTROL = (
    "Not planned before the runs: tuning gave SFT another learning rate than most methods, and a smaller one forgets "
    "less by itself. Method minus SFT, both at the method's learning rate, paired by seed."
)
ABLATIONS = ("lambda", "alpha", "layers", "flavours", "questions", "remedies")


def _grouped(data: Rows, experiment: str) -> dict[str, dict[str, Rows]]:
    """task -> label -> rows, in the order in which they were run."""
    tasks: dict[str, dict[str, Rows]] = defaultdict(lambda: defaultdict(list))
    for row in data:
        if row["experiment"] == experiment:
            tasks[row["task"]][row["label"]].append(row)
    return {task: dict(labels) for task, labels in tasks.items()}


def _paired(ours: Rows, reference: Rows, metric: str) -> str:
    found = None if ours is reference else paired(ours, reference, metric)
    return "" if found is None else str(found)


def comparison(data: Rows, experiment: str) -> str:
    """One table a task, best score first."""
    text = []
    for task, labels in _grouped(data, experiment).items():
        reference = labels.get("SFT", [])
        text.append(f"### {task}\n")
        text.append(f"| method | {' | '.join(COLUMNS.values())} | score minus SFT's | seconds |")
        text.append(f"|---|{'---|' * (len(COLUMNS) + 2)}")
        order = sorted(labels.items(), key=lambda item: -statistics.fmean(r["score"] for r in item[1]))
        for label, runs in order:
            cells = [str(estimate([r[name] for r in runs])) for name in COLUMNS]
            seconds = statistics.median(r["train_seconds"] for r in runs)
            text.append(f"| {label} | {' | '.join(cells)} | {_paired(runs, reference, 'score')} | {seconds:.1f} |")
        text.append("")
    return "\n".join(text)


def ablation(data: Rows, experiment: str) -> str:
    """One table for both regimes of label noise."""
    tasks = _grouped(data, experiment)
    labels = list(dict.fromkeys(label for part in tasks.values() for label in part))
    head = [
        f"{task}: {name}" for task in tasks for name in ("in-domain", "retention", "score minus SFT's at the same rate")
    ]
    text = [f"| variant | {' | '.join(head)} |", f"|---|{'---|' * len(head)}"]
    for label in labels:
        cells = []
        for task, part in tasks.items():
            runs = part.get(label, [])
            if not runs:
                cells += ["", "", ""]
                continue
            cells += [str(estimate([r[name] for r in runs])) for name in ("in_domain", "retention")]
            cells.append(_paired(runs, sft_at(data, task, runs[0]["lr"]), "score"))
        text.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(text) + "\n"


def verdicts(data: Rows) -> str:
    """Every hypothesis on every task."""
    text = ["| | claim | method | task | difference | |", "|---|---|---|---|---|---|"]
    for claim, experiment, task, found in answers(data):
        tuning = " (full tuning)" if experiment == "compare-full" else ""
        text.append(
            f"| {claim.hypothesis} | {claim.text} | {claim.better} | {task}{tuning} | {found} | "
            f"{claim.verdict(found)} |"
        )
    return "\n".join(text) + "\n"


def tuned(data: Rows) -> str:
    """What was chosen."""
    text = ["| tuned on | method | learning rate | settings | score |", "|---|---|---|---|---|"]
    for experiment in ("tune-skills", "tune-text"):
        scores: dict[tuple[str, str, float, float], list[float]] = defaultdict(list)
        for row in data:
            if row["experiment"] == experiment:
                scores[row["label"], row["settings"], row["lr"], row["dropout"]].append(row["score"])
        for label, cell in chosen(data, experiment).items():
            settings = {**json.loads(cell.settings), **({"dropout": cell.dropout} if cell.dropout else {})}
            words = ", ".join(f"{k} {v}" for k, v in settings.items()) or "none"
            score = statistics.fmean(scores[label, cell.settings, cell.lr, cell.dropout])
            text.append(f"| {experiment[5:]} | {label} | {cell.lr:g} | {words} | {score:.3f} |")
    return "\n".join(text) + "\n"


def robustness(data: Rows, experiment: str, metrics: list[str]) -> str:
    """Mean figures by method."""
    text = []
    for task, labels in _grouped(data, experiment).items():
        text += [f"| {task} | {' | '.join(metrics)} | minus SFT's |", f"|---|{'---|' * (len(metrics) + 1)}"]
        for label, runs in labels.items():
            cells = [str(estimate([r[m] for r in runs])) for m in metrics]
            text.append(f"| {label} | {' | '.join(cells)} | {_paired(runs, labels['SFT'], metrics[-1])} |")
        text.append("")
    return "\n".join(text)


def provenance(data: Rows) -> str:
    """Where the numbers come from."""
    commits = ", ".join(dict.fromkeys(row["commit"] for row in data))
    dates = sorted({row["date"] for row in data})
    counts = ", ".join(f"{name} {sum(r['experiment'] == name for r in data)}" for name in EXPERIMENTS)
    timed = [row["seconds"] for row in data if "seconds" in row]
    hours = f"The {len(timed)} runs that were timed took {sum(timed) / 3600:.1f} core-hours. " if timed else ""
    return (
        f"{len(data)} runs in `{RESULTS.relative_to(ROOT)}` ({counts}), commits {commits}, {dates[0]} to {dates[-1]}. "
        f"{hours}Every row has the experiment, task, method, settings, learning rate, seed, split, commit and date; "
        "`make evidence` repeats what is missing and writes this page. `make evidence-again` repeats the comparisons "
        "behind the answers in under an hour, with the same hyperparameters and fresh seeds, and says which agree.\n"
    )


def page(data: Rows) -> str:
    """The whole page."""
    reading = (PARTS / "reading.md").read_text(encoding="utf-8")
    hypotheses = (PARTS / "hypotheses.md").read_text(encoding="utf-8").replace("# Hyp", "## Hyp", 1)
    parts = [
        "# The first comparison\n",
        reading,
        hypotheses,
        "## Answers\n",
        verdicts(data),
        "![scores](figures/evidence_scores.png)\n",
        "## The comparison\n",
        comparison(data, "compare-skills"),
    ]
    for name in COMPARED:
        if at_equal_rate(data, name, "score"):
            parts += [
                f"## Against SFT at the same learning rate: {name.removeprefix('compare-')}\n",
                f"{CONTROL}\n",
                table(data, name, COLUMNS),
            ]
    titles = {
        "compare-text": "## Text tasks\n",
        "compare-full": "## Full fine-tuning\n",
        "long": "## Few examples, many steps\n",
    }
    for name, title in titles.items():
        if any(row["experiment"] == name for row in data):
            parts += [title, comparison(data, name)]
    for name in ABLATIONS:
        if any(row["experiment"] == name for row in data):
            parts += [f"## {name.capitalize()}\n", ablation(data, name)]
            if name == "alpha":
                parts.append("![alpha](figures/evidence_alpha.png)\n")
    if any(row["experiment"] == "noise" for row in data):
        parts += ["## Noise on the embeddings\n", robustness(data, "noise", ["cosine"])]
        parts.append("![noise](figures/evidence_noise.png)\n")
    if any(row["experiment"] == "refusal" for row in data):
        metrics = ["refused/0", "refused/4", "refused/16", "refused"]
        parts += ["## A refusal under attack\n", robustness(data, "refusal", metrics)]
    parts += ["## What was tuned\n", tuned(data), "## Provenance\n", provenance(data)]
    return "\n".join(parts)


def main() -> None:
    """Page and figures."""
    data = rows()
    FIGURES.mkdir(exist_ok=True)
    draw_scores(data, FIGURES / "evidence_scores.png")
    draw_alpha(data, FIGURES / "evidence_alpha.png")
    draw_noise(data, FIGURES / "evidence_noise.png")
    PAGE.write_text(page(data), encoding="utf-8")


if __name__ == "__main__":
    main()
