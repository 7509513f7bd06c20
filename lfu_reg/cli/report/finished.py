"""What a folder of `lfu-reg compare` holds, whether it was finished or stopped on the way."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfu_reg.cli.compare.store import is_row
from lfu_reg.cli.errors import Unusable

BASE = {"point", "samples"}
RUN = {"rate", "seed", "strength", "step", "points", "step_seconds", "peak_mb", "samples", "warnings"}


@dataclass(frozen=True)
class Finished:
    """A comparison as far as it went.

    Attributes:
        folder: where it lies.
        setting: what was the same for all runs.
        environment: hardware, versions, commit and date.
        base: the base model's row.
        rows: of finished runs.
    """

    folder: Path
    setting: dict[str, Any]
    environment: dict[str, str]
    base: dict[str, Any]
    rows: list[dict[str, Any]]


def read(folder: Path) -> Finished:
    """Read it.

    Raises:
        Unusable: for a folder that is none of `lfu-reg compare`, or in which nothing is finished.
    """
    if not folder.is_dir():
        raise Unusable(f"RUN {folder}: there is no such folder. Give the one that `lfu-reg compare` had as --out.")
    missing = [name for name in ("setting.json", "runs.jsonl") if not (folder / name).is_file()]
    if missing:
        raise Unusable(f"RUN {folder}: no folder of `lfu-reg compare`: it has no {' and no '.join(missing)}.")
    try:
        written = json.loads((folder / "setting.json").read_text(encoding="utf-8"))
        setting, environment = dict(written["setting"]), dict(written["environment"])
        lines = (folder / "runs.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Unusable(f"RUN {folder}: its files cannot be read ({type(error).__name__}: {error}).") from error
    rows = [json.loads(line) for line in lines if is_row(line)]
    base = next((row for row in rows if row.get("run") == "base"), None)
    if base is None:
        raise Unusable(f"RUN {folder}: nothing is finished there yet; the same `lfu-reg compare` goes on with it.")
    runs = [row for row in rows if row is not base]
    if not (base.keys() >= BASE and all(row.keys() >= RUN for row in runs)):
        raise Unusable(f"RUN {folder}: its runs.jsonl was not written by this version of `lfu-reg compare`.")
    return Finished(folder, setting, environment, base, runs)
