"""Finished runs: one JSON object a line. A run that a file holds already is not repeated, whichever table asks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def records(file: Path) -> list[Record]:
    """All finished runs."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def find(done: list[Record], run: Record) -> Record | None:
    """The record of a run, or None."""
    return next((record for record in done if record["run"] == run), None)


def append(file: Path, record: Record) -> None:
    """Adds a finished run; one short write, so that an interrupt loses one run at most."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(_rounded(record)) + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(v) if key != "run" else v for key, v in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value
