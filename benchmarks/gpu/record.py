"""The result file of a stage. It is complete at any moment, whatever happens to the process that writes it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

SCHEMA = "lfu-reg gpu 1"
# What can become of a part: it waits, runs, succeeds, has nothing to do here, or comes to one of four ends.
WAITING, RUNNING, OK, SKIPPED = "not reached", "running", "ok", "skipped"
FAILED, NO_MEMORY, HUNG, DIED = "failed", "out of memory", "hung", "died"

Part = dict[str, Any]


class Record:
    """The parts of one stage, each with its state, its seconds, and its result or its error in full."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = json.loads(path.read_text())

    @classmethod
    def begin(cls, path: Path, stage: str, parts: list[str], *, rehearsal: bool) -> Record:
        """A file in which every part waits."""
        waiting = {name: {"state": WAITING} for name in parts}
        content = {"schema": SCHEMA, "stage": stage, "rehearsal": rehearsal, "surroundings": {}, "parts": waiting}
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, content)
        return cls(path)

    @property
    def parts(self) -> dict[str, Part]:
        """By name, in order of worth."""
        parts: dict[str, Part] = self.content["parts"]
        return parts

    def named(self, state: str) -> list[str]:
        """The parts in that state."""
        return [name for name, part in self.parts.items() if part["state"] == state]

    def start(self, name: str) -> None:
        """The part runs from now on."""
        self.parts[name] = {"state": RUNNING, "since": time.time()}
        self.write()

    def end(self, name: str, state: str, **more: Any) -> None:
        """The part has come to its end; `more` is its result or its error."""
        since = self.parts[name].get("since", time.time())
        self.parts[name] = {"state": state, "seconds": round(time.time() - since, 2), **more}
        self.write()

    def write(self) -> None:
        """Replace the file as a whole."""
        _replace(self.path, self.content)


def _replace(path: Path, content: dict[str, Any]) -> None:
    beside = path.with_name(f".{path.name}")
    beside.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(beside, path)
