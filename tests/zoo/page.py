"""Write docs/zoo.md from results.csv: `python -m tests.zoo.page`."""

from __future__ import annotations

from collections import Counter
from importlib.metadata import version
from pathlib import Path

from tests.zoo import results
from tests.zoo.table import NAMED, exception_of

PAGE = Path(__file__).parents[2] / "docs" / "zoo.md"
HEADINGS = {
    "causal": "Causal language models",
    "masked": "Masked language models",
    "seq2seq": "Sequence to sequence",
    "classification": "Sequence classification",
    "image": "Image classification",
    "audio": "Audio classification",
    "speech": "Speech to text",
}
INTRODUCTION = """\
# Models

Does it work with my model? Every model type that transformers {transformers} maps to a causal or a masked language
model, and samples of other tasks, were made tiny, with random weights, and one step was compared with a separate,
literal computation (torch {torch}, CPU). *Exact* means a relative error of at most 1e-8, in float64 unless a remark
says otherwise. A model that is not listed works if it has blocks that return their hidden state;
[what to do with one that does not](gotchas/unsupported-architectures.md).

{summary}

<div class="lfu-filter-here" data-hint="Part of a model's name"></div>

What the columns say:

* **layers**: what `layers="all"` takes / what ran (a vision tower does not run on text).
* **maps**: linear maps with a LoRA delta.
* **error**: the largest relative error of any parameter's gradient, or of what the consistency term adds to all of
  them, with steering vectors, LoRA deltas, weights, and steering vectors under dropout.
* **effect**: what the consistency term adds to the gradient, relative to the gradient of the SFT loss; the smallest of
  these, so agreement is not agreement about nothing.
* Hooks, parameters, buffers and outputs after `remove()` are bit for bit those of plain fine-tuning, for each.

<!-- Written by `make zoo`, which goes on where it was stopped; do not edit. All errors: tests/zoo/results.csv. -->
"""


def main() -> None:
    """Render the page."""
    rows = results.read()
    counts = Counter((row["task"], row["outcome"]) for row in rows)
    tasks = [task for task in HEADINGS if any(row["task"] == task for row in rows)]
    outcomes = list(dict.fromkeys(row["outcome"] for row in sorted(rows, key=lambda r: r["outcome"] != "exact")))
    summary = [f"| task | {' | '.join(outcomes)} |", "|---" * (len(outcomes) + 1) + "|"]
    summary += [
        f"| {HEADINGS[task]} | {' | '.join(str(counts[task, outcome]) for outcome in outcomes)} |" for task in tasks
    ]
    text = INTRODUCTION.format(
        transformers=version("transformers"), torch=version("torch").split("+")[0], summary="\n".join(summary)
    )
    for task in tasks:
        text += f"\n## {HEADINGS[task]}\n\n{_table([row for row in rows if row['task'] == task])}"
    PAGE.write_text(text)


def _table(rows: list[dict[str, str]]) -> str:
    lines = ["| model type | class | layers | maps | error | effect | remarks |", "|---|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda r: r["model_type"]):
        expected = exception_of(row["task"], row["model_type"])
        remark = "" if row["outcome"] == "exact" else f"{row['outcome']}: {expected.reason if expected else '?'}"
        named = [text for part, text in NAMED.items() if part in row["remarks"]]
        remark = "; ".join([*named, *([remark] if remark else [])])
        if row["dtype"] != "float64" and row["outcome"] != "not built":
            remark = f"{row['dtype']}. {remark}"
        cells = [row["model_type"], row["class_name"], f"{row['blocks']} / {row['ran']}", row["linears"]]
        figures = [figure.replace("e-", "e\u2011") for figure in (_largest_error(row), row["effect"])]  # unbroken
        lines.append(f"| {' | '.join([*cells, *figures, remark])} |")
    return "\n".join(lines) + "\n"


def _largest_error(row: dict[str, str]) -> str:
    """The largest number of the columns, and the words that stand in others ("none": no dropout rate to try)."""
    found = {name: row[name] for name in ("steering", "lora", "weights", "dropout") if row[name] not in ("", "none")}
    numbers = [cell for cell in found.values() if cell[0].isdigit()]
    words = [f"{name} {cell}" for name, cell in found.items() if not cell[0].isdigit()]
    return ", ".join([max(numbers, key=float), *words]) if numbers else ""


if __name__ == "__main__":
    main()
