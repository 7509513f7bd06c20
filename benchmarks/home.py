"""Fills in the cost and the evidence on the first page of the documentation: `python -m home` in benchmarks/."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from evidence.store import Rows, rows
from study import words
from study.cells import RESULTS

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "index.md"
STEP = ROOT / "benchmarks" / "results" / "step_cpu_lora.json"


def cost(step: dict[str, Any]) -> str:
    """What a step costs, from a result of `lfu-reg overhead`."""
    ratio = {row["key"]: row["ratio"] for row in step["rows"]}
    return (
        f"* **Cost:** a step takes {ratio['steering']:.2f} (steering) to {ratio['lora']:.2f} (LoRA) times as long as "
        f"plain fine-tuning, and {ratio['steering-late']:.2f} to {ratio['lora-late']:.2f} times on the last third of "
        "the layers: a small Llama on one CPU thread. [What it costs](cost.md)\n"
    )


def evidence(data: Rows) -> str:
    """What LfU forgets less than SFT's own curve."""
    return f"* **Evidence:** {words.short(data)} [Does it help](evidence.md)\n"


def filled(text: str) -> str:
    """The page with both lines between its marks."""
    lines = cost(json.loads(STEP.read_text())) + evidence(rows(RESULTS))
    return re.sub(r"(<!-- figures -->\n\n).*?(\n<!-- /figures -->)", rf"\g<1>{lines}\2", text, flags=re.S)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
