"""Fills in the cost and the evidence on the first page of the documentation: `python -m home` in benchmarks/."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

from evidence.control import at_equal_rate, sft_at
from evidence.store import Rows, rows

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "index.md"
STEP = ROOT / "benchmarks" / "results" / "step_cpu_lora.json"
COMPARISON, TASK, METHOD = "compare-text", "gsm8k-64", "LfU steering"


def cost(step: dict[str, Any]) -> str:
    """What a step costs, from a result of `lfu-reg overhead`."""
    ratio = {row["key"]: row["ratio"] for row in step["rows"]}
    return (
        f"* **Cost:** a step takes {ratio['steering']:.2f} (steering) to {ratio['lora']:.2f} (LoRA) times as long as "
        f"plain fine-tuning, and {ratio['steering-late']:.2f} to {ratio['lora-late']:.2f} times on the last third of "
        "the layers: a small Llama on one CPU thread. [What it costs](cost.md)\n"
    )


def evidence(data: Rows) -> str:
    """What was kept of the base model, and what it cost, at the same learning rate as plain SFT."""
    rate, retention = at_equal_rate(data, COMPARISON, "retention")[TASK, METHOD]
    _, in_domain = at_equal_rate(data, COMPARISON, "in_domain")[TASK, METHOD]
    plain = statistics.fmean(row["retention"] for row in sft_at(data, TASK, rate, COMPARISON))
    return (
        f"* **Evidence:** fine-tuned on 64 examples of GSM8K, a model of 2.2 M parameters keeps "
        f"{plain + retention.mean:.2f} of what it could do before, where plain fine-tuning keeps {plain:.2f} "
        f"(p {retention.p:.3f}), for {-in_domain.mean:.3f} of token accuracy on GSM8K. Where plain fine-tuning forgets "
        "little, it makes no difference. [Does it help](evidence.md)\n"
    )


def filled(page: str) -> str:
    """The page with both lines between its marks."""
    lines = cost(json.loads(STEP.read_text())) + evidence(rows())
    return re.sub(r"(<!-- figures -->\n\n).*?(\n<!-- /figures -->)", rf"\g<1>{lines}\2", page, flags=re.S)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
