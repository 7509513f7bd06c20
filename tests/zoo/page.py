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
# Model zoo

Every model type that transformers maps to a causal or a masked language model, and samples of other tasks, each as a
tiny model with random weights (transformers {transformers}, torch {torch}, CPU). A step of the library on the untouched
model is compared with the oracle: three literal forward passes that share no code with it.

* **blocks**: layers that `layers="all"` finds / that the batch runs (a vision tower does not run on text).
* **maps**: linear maps with a LoRA delta.
* **steering, lora, weights, dropout**: the largest relative error of any parameter's gradient, or of what the
  consistency term adds to all of them; dropout is steering vectors at a dropout rate of 0.3. In float64 unless a remark
  says otherwise; up to 1e-8 counts as exact. "none": the configuration has no dropout rate.
* **effect**: what the consistency term adds to the gradient, relative to the gradient of the SFT loss, the smallest of
  the auxiliaries: the errors are not agreement about nothing.

For each, hooks, flags, names, parameters, buffers and outputs after `remove()` are bit for bit those of plain SFT.

{summary}

Made by `make zoo`, which goes on where it was stopped; `rm tests/zoo/results.csv` before it starts afresh.
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
    lines = [
        "| model type | class | blocks | maps | steering | lora | weights | dropout | effect | remarks |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda r: r["model_type"]):
        expected = exception_of(row["task"], row["model_type"])
        remark = "" if row["outcome"] == "exact" else f"{row['outcome']}: {expected.reason if expected else '?'}"
        named = [text for part, text in NAMED.items() if part in row["remarks"]]
        remark = "; ".join([*named, *([remark] if remark else [])])
        if row["dtype"] != "float64" and row["outcome"] != "not built":
            remark = f"{row['dtype']}. {remark}"
        cells = [row["model_type"], row["class_name"], f"{row['blocks']} / {row['ran']}", row["linears"]]
        cells += [row[name] for name in ("steering", "lora", "weights", "dropout", "effect")]
        lines.append(f"| {' | '.join([*cells, remark])} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
