"""The Triton kernels on a machine without a GPU, by Triton's interpreter, against the plain float64 version."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.distances.kernels.checks import CHECKS

TRITON = version("triton") if find_spec("triton") else "0"
pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(
        TRITON.startswith("3.2"), reason="triton 3.2's interpreter turns arrays into numbers as NumPy 2.4 forbids"
    ),
]


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    """One process for all checks: the interpreter is chosen when triton is imported."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.distances.kernels.interpreted"],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    found: dict[str, str] = json.loads(run.stdout)
    return found


@pytest.mark.parametrize("name", CHECKS)
def test_interpreted(name: str, results: dict[str, str]) -> None:
    assert results[name] == "", results[name]
