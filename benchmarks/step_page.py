"""Renders docs/cost.md from the result files of step.py, so that no number is typed by hand.

python benchmarks/step_page.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("step_*.json"))

HEAD = """# What it costs

Written by `python benchmarks/step_page.py` from `benchmarks/results/step_*.json`; do not edit.

One training step is a forward and a backward pass. All methods run interleaved in one process; a ratio is taken in
every round, and the table has its median and quartiles. The floor of any exact step is one plus the blocks' share of
SFT's
forward and backward, since gradients have to flow through the blocks twice. *Literal* is the paper's text as it reads,
with three forwards; the authors' procedure is the one of their LoRA code. On CPU, memory is the peak of the bytes that
autograd keeps for backward passes, and on one thread time is processor time.
"""


def main() -> None:
    """Write the page."""
    sections = [section(json.loads(path.read_text()), path.name) for path in RESULTS]
    (ROOT / "docs" / "cost.md").write_text("\n".join([HEAD, *sections]))


def section(result: dict[str, Any], source: str) -> str:
    """The table of one result file."""
    s = result["setting"]
    lines = [
        f"## {s['tuning']} tuning, {s['device']}, {s['dtype']}",
        "",
        f"Llama with {s['layers']} layers, hidden size {s['hidden']}, vocabulary {s['vocab']}; "
        f"{s['batch']} x {s['tokens']} tokens; {s['threads']} thread(s), {s['rounds']} rounds. "
        f"torch {result['torch']}, transformers {result['transformers']}, {result['processor']}, {result['date']}, "
        f"commit {result['commit']} (`{source}`). "
        f"The blocks' share is {result['blocks_share']:.3f}, the floor {result['floor']:.3f}; the clean hidden states "
        f"take {result['clean_states_mb']} MB.",
        "",
        "| method | ms | ratio to SFT | quartiles | of the floor | peak MB |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        low, high = row["ratio_quartiles"]
        lines.append(
            f"| {row['method']} | {row['ms']:.0f} | {row['ratio']:.2f} | {low:.2f} to {high:.2f} "
            f"| {row['over_floor']:.3f} | {row['peak_mb']:.0f} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
