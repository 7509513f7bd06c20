"""What a rehearsal has besides: a folder of a few made-up data, and how its failures have to end."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from gpu.record import DIED, FAILED, HUNG, NO_MEMORY, OK, SKIPPED

EXPECTED = {
    "raises": FAILED,
    "runs out of memory": NO_MEMORY,
    "has nothing to do": SKIPPED,
    "hangs": HUNG,
    "is killed": DIED,
    "loses the device": FAILED,
    "goes on": OK,
}
TEXT = "The quick brown fox jumps over the lazy dog. " * 4


def write_data(folder: Path) -> Path:
    """The files that the study reads, in `evidence.corpus`'s layout."""
    questions = [{"question": f"What is {n} + 1?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1}"} for n in range(64)]
    _write(folder / "gsm8k" / "train.jsonl.gz", questions)
    _write(folder / "gsm8k" / "test.jsonl", questions[:4])
    _write(folder / "novels" / "validation.jsonl.gz", [{"text": TEXT}] * 4)
    _write(folder / "lambada" / "test.jsonl.gz", [{"context": "The end of the", "continuation": "story"}] * 2)
    _write(folder / "wikitext2" / "test.txt.gz", TEXT)
    return folder


def _write(file: Path, content: Any) -> None:
    text = content if isinstance(content, str) else "\n".join(map(json.dumps, content))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress(text.encode()) if file.suffix == ".gz" else text.encode())
