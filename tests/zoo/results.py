"""The results as a CSV file: one row per species, written as soon as it is known, so that a run can be resumed."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

FILE = Path(__file__).with_name("results.csv")
FIELDS = (
    "task", "model_type", "class_name", "outcome", "dtype", "blocks", "ran", "linears", "steering", "lora", "weights",
    "dropout", "effect", "seconds", "remarks",
)  # fmt: skip


def read(file: Path = FILE) -> list[dict[str, str]]:
    """The rows so far."""
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def write(rows: list[dict[str, str]], file: Path = FILE) -> None:
    """All rows, in the order of the catalogue's tasks and of names."""
    with file.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def append(row: Mapping[str, str], file: Path = FILE) -> None:
    """One more row."""
    is_new = not file.exists()
    with file.open("a", newline="") as lines:
        writer = csv.DictWriter(lines, FIELDS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)
