"""Rows on disk: one JSON object per finished run, so that an interrupted comparison goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lfu_reg.cli.compare.plan import Run, Setting
from lfu_reg.cli.environment import environment
from lfu_reg.cli.errors import Unusable


class Store:
    """The folder of a comparison.

    Attributes:
        folder: where everything goes.
        base: scores of the base model; None until they are there.
        rows: of finished runs.
    """

    def __init__(self, folder: Path, setting: Setting, rows: str, weights: str) -> None:
        self.folder = folder
        self._file = folder / "runs.jsonl"
        self.base: dict[str, Any] | None = None
        self.rows: list[dict[str, Any]] = []
        files = {"data": str(setting.data), "keep": [str(file) for file in setting.keep]}
        self._open({**asdict(setting), **files, "rows": rows, "weights": weights})
        for row in self._lines():
            if row["run"] == "base":
                self.base = row
            else:
                self.rows.append(row)

    def pending(self, runs: Iterable[Run]) -> list[Run]:
        """Those of the runs that are not finished."""
        finished = {row["run"] for row in self.rows}
        return [run for run in runs if run.key not in finished]

    def add(self, row: dict[str, Any]) -> None:
        """Write a row at once."""
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if row["run"] == "base":
            self.base = row
        else:
            self.rows.append(row)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """What was shown in the end."""
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")

    def adapter(self, run: Run) -> Path:
        """Where a run's adapter goes."""
        return self.folder / "adapters" / run.key

    def _open(self, setting: dict[str, Any]) -> None:
        """Make the folder, or see that it holds runs of the same setting."""
        file = self.folder / "setting.json"
        setting = json.loads(json.dumps(setting))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if file.exists():
                before = dict(json.loads(file.read_text(encoding="utf-8"))["setting"])
            else:
                before = setting
                written = {"setting": setting, "environment": environment(setting["device"])}
                file.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Unusable(f"--out {self.folder}: cannot be used ({error}). Give another folder.") from error
        names = [name for name in setting if before.get(name) != setting[name]]
        if changed := [f"{name} was {before.get(name)} and is {setting[name]}" for name in names]:
            raise Unusable(
                f"--out {self.folder}: it holds runs of another setting ({'; '.join(changed)}), which cannot be "
                "compared with new ones. Give another folder, or delete this one."
            )

    def _lines(self) -> list[dict[str, Any]]:
        """What is there; a last line that was being written when the machine stopped is cut off."""
        if not self._file.exists():
            return []
        lines = self._file.read_text(encoding="utf-8", errors="replace").splitlines()
        whole = [line for line in lines if is_row(line)]
        if len(whole) < len(lines):
            self._file.write_text("".join(f"{line}\n" for line in whole), encoding="utf-8")
        return [json.loads(line) for line in whole]


def is_row(line: str) -> bool:
    """Whether a line was written whole."""
    try:
        row = json.loads(line)
        return isinstance(row, dict) and "run" in row
    except ValueError:
        return False
