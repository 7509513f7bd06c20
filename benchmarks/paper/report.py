"""Tables of what was measured, beside what the paper published: `python -m paper.report` in benchmarks/."""

from __future__ import annotations

import csv
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

PUBLISHED = Path(__file__).parent / "published.csv"


def published() -> dict[tuple[str, str, str], str]:
    """(table, row, figure) -> the published number, for those that the paper's abstract and text state."""
    with PUBLISHED.open(newline="", encoding="utf-8") as file:
        return {(r["table"], r["row"], r["figure"]): r["value"] for r in csv.DictReader(file)}


def records(folder: Path) -> list[dict[str, Any]]:
    """All finished rows."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.rglob("*.json"))
            if "adapter_config" not in file.name and "tokenizer" not in file.name]  # fmt: skip


def page(folder: Path) -> str:
    """Markdown tables, one for each table, model and training set."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for record in records(folder):
        if "scores" in record:
            groups[record["table"], record["model"], record["data"]].append(record)
    known, text = published(), []
    for (table, model, data), rows in groups.items():
        figures = list(dict.fromkeys(name for row in rows for name in row["scores"]))
        text += [f"## {table}: {model} on {data}\n", f"| method | {' | '.join(figures)} | seconds |"]
        text.append(f"|---|{'---|' * (len(figures) + 1)}")
        for row in rows:
            cells = []
            for name in figures:
                paper = known.get((table, row["row"], name))
                cells.append(f"{row['scores'].get(name, float('nan')):.3f}{f' (paper {paper})' if paper else ''}")
            text.append(f"| {row['row']} | {' | '.join(cells)} | {row['seconds']} |")
        text.append("")
    return "\n".join(text)


if __name__ == "__main__":
    print(page(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("../runs/paper")))
