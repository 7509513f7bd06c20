"""The results: one JSON object a line, appended as runs end, so that an interrupt loses one run at most."""

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evidence.finetune import Spec

ROOT = Path(__file__).resolve().parents[2]
Rows = list[dict[str, Any]]
RESULTS = ROOT / "benchmarks" / "results" / "evidence.jsonl"


def commit() -> str:
    """The commit that the runs are made from, with a plus where files differ from it."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    code = ("lfu_reg", "benchmarks", ":(exclude)benchmarks/results")
    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--", *code) else "")


def append(spec: Spec, figures: dict[str, Any], at: str, path: Path = RESULTS) -> None:
    """Adds a run. One short write to a file opened for appending, so that several processes may do so."""
    rounded = {name: float(f"{value:.5g}") for name, value in figures.items()}
    row = {**asdict(spec), **rounded, "commit": at, "date": time.strftime("%Y-%m-%d")}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def rows(path: Path = RESULTS) -> Rows:
    """All runs so far."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def spec_of(row: dict[str, Any]) -> Spec:
    """The run that a row is about."""
    return Spec(**{name: row[name] for name in Spec.__dataclass_fields__})
