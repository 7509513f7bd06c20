"""Applies a mutant to a copy of the package and runs its test there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_TEST_FAILED, _TIMEOUT_S = 1, 3600  # pytest's exit status; others mean that nothing was tested
_COPIED = ("lfu_reg", "tests", "benchmarks", "docs", "pyproject.toml", "README.md", "mkdocs.yml", "Makefile")


@dataclass(frozen=True)
class Mutant:
    """A guard taken out.

    Attributes:
        row: of the failure table that the guard is for.
        what: the guard, in a few words.
        file: where it is, below lfu_reg/.
        old: the text that is replaced, which occurs once.
        new: what it is replaced with.
        test: pytest id of a test that must fail then.
    """

    row: int
    what: str
    file: str
    old: str
    new: str
    test: str

    def applied(self, source: str) -> str:
        """The mutated text of the file.

        Raises:
            ValueError: if the guard is not there exactly once, so that the mutant has to be written anew.
        """
        if source.count(self.old) != 1:
            raise ValueError(f"{self.file} has {source.count(self.old)} times {self.old!r}; it has to be there once.")
        return source.replace(self.old, self.new)


def check_tests_pass(mutants: Iterable[Mutant]) -> None:
    """Raise unless the tests pass with all guards in place: one that fails anyway would catch every mutant."""
    ran = _run(dict.fromkeys(mutant.test for mutant in mutants), ROOT)
    if ran.returncode != 0:
        raise RuntimeError(f"These tests have to pass with the guards in place:\n{ran.stdout}{ran.stderr}")


def is_caught(mutant: Mutant) -> bool:
    """Whether the mutant's test fails with the guard taken out.

    Raises:
        RuntimeError: if the test did not run to its end.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in _COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy / name)
        file = copy / "lfu_reg" / mutant.file
        file.write_text(mutant.applied(file.read_text()))
        ran = _run([mutant.test], copy)
    if ran.returncode not in (0, _TEST_FAILED):
        raise RuntimeError(f"{mutant.test} was not run (exit status {ran.returncode}):\n{ran.stdout}{ran.stderr}")
    return ran.returncode == _TEST_FAILED


def _run(tests: Iterable[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
    )
