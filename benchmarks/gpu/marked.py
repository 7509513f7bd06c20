"""The tests marked `cuda`, by pytest in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from gpu.place import Place

ROOT = Path(__file__).resolve().parents[2]


def tests(place: Place) -> dict[str, Any]:
    """How many passed; every failure in full."""
    # Other files are not even collected: they import what need not be installed.
    files = [
        str(file) for file in sorted((ROOT / "tests").rglob("test_*.py")) if "pytest.mark.cuda" in file.read_text()
    ]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "cuda",
            "-p",
            "no:cacheprovider",
            f"--junitxml={report}",
            *files,
        ]
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if not report.exists():
            raise RuntimeError(f"pytest ended with {ran.returncode}:\n{ran.stdout[-4000:]}{ran.stderr[-4000:]}")
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    skipped = [case for case in cases if case.find("skipped") is not None]
    failed = {
        f"{case.get('classname')}::{case.get('name')}": found.text
        for case in cases
        for found in (*case.findall("failure"), *case.findall("error"))
    }
    if failed:
        texts = "\n\n".join(f"{name}\n{text}" for name, text in failed.items())
        raise AssertionError(f"{len(failed)} of {len(cases)} tests failed\n\n{texts}")
    if not cases or (len(skipped) == len(cases) and not place.rehearsal):
        raise AssertionError(f"none of {len(cases)} tests ran:\n{ran.stdout[-4000:]}")
    return {"passed": len(cases) - len(skipped), "skipped": len(skipped), "files": [Path(f).name for f in files]}
