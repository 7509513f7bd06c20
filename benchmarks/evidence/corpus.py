"""Text for pretraining and for measuring forgetting, from a folder of public data that the user points to."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("LFU_DATA", ROOT.parent / "shared" / "data"))


class NoData(RuntimeError):
    """The public data are not there."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"{path} does not exist. Set LFU_DATA to a folder that holds the public data sets (gsm8k/train.jsonl.gz, "
            "novels/train-0.jsonl.gz, wikitext2/test.txt.gz, ...); docs/evidence-data.md lists them."
        )


def lines(name: str) -> Iterator[str]:
    """The lines of a plain or gzipped text file below `DATA`."""
    path = DATA / name
    if not path.exists():
        raise NoData(path)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        yield from file


def records(name: str) -> list[dict]:
    """The objects of a JSON-lines file below `DATA`."""
    return [json.loads(line) for line in lines(name) if line.strip()]


def novels(split: str) -> Iterator[str]:
    """The text of one novel at a time, hard line breaks taken out."""
    for part in ("validation",) if split == "validation" else [f"train-{i}" for i in range(4)]:
        for record in records(f"novels/{part}.jsonl.gz"):
            yield re.sub(r"(?<!\n)\n(?!\n)", " ", record["text"])


def wikitext(split: str) -> str:
    """WikiText-2, detokenised roughly: pretraining uses "valid", measurements "test"."""
    text = "".join(lines(f"wikitext2/{split}.txt.gz"))
    text = re.sub(r" @(.)@ ", r"\1", text)
    return re.sub(r" ([.,;:!?)])", r"\1", text)
