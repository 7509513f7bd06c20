"""Results as CSV files: a row is appended as its run ends, and what a file has is not run again."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results"


def rows(name: str) -> list[dict[str, str]]:
    """The rows of `results/strength_NAME.csv` so far."""
    path = path_of(name)
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def has(found: Iterable[Mapping[str, str]], **keys: Any) -> bool:
    """Whether a row has all of these values."""
    return any(all(row[name] == str(value) for name, value in keys.items()) for row in found)


def append(name: str, row: Mapping[str, Any]) -> None:
    """Add a row; numbers get four digits, which is more than they are known to."""
    path = path_of(name)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})


def path_of(name: str) -> Path:
    """Where they are."""
    return RESULTS / f"strength_{name}.csv"
