"""docs/gpu.md has every stage, every threshold, and every line that only CUDA reaches."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from gpu import verdicts
from gpu.stages import STAGES

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "gpu.md").read_text()
ROWS = re.findall(r"^\| `([\w/]+\.py)` \| `(.+?)` \| ", PAGE, flags=re.MULTILINE)
ONLY_CUDA = re.compile(
    r'torch\.cuda|pin_memory|get_device_module|torch\.accelerator|"cuda"|non_blocking|Generator\(device\)'
    r'|device\.type [!=]= "cpu"|ProfilerActivity\.CUDA'
)


def test_the_stages_are_those_that_run() -> None:
    (rows,) = re.findall(r"^\| file \| minutes .*?\n\n", PAGE, flags=re.MULTILINE | re.DOTALL)
    shown = re.findall(r"^\| (?:`(\w+)\.json`)? ?\| ([\d.]*) ?\| ([^|]+?) \| ", rows, flags=re.MULTILINE)
    expected = [
        (stage.name if first else "", f"{stage.minutes:g}" if first else "", part.name)
        for stage in STAGES
        for first, part in [(part is stage.parts[0], part) for part in stage.parts]
    ]
    assert [row for row in shown if row[2] not in ("part", "---")] == expected


def test_the_thresholds_are_those_that_are_used() -> None:
    values = re.findall(r"\| at (least|most) ([\d.]+) \|", PAGE)
    least, most = ([float(v) for word, v in values if word == kind] for kind in ("least", "most"))
    assert least == [verdicts.OF_COPY, verdicts.OF_TORCH]
    assert most == [verdicts.OVER_FLOOR, verdicts.ONE_BACKWARD, verdicts.PEAK]


@pytest.mark.parametrize(("file", "line"), ROWS)
def test_a_line_exists(file: str, line: str) -> None:
    assert line in (ROOT / file).read_text()


FILES = [*(ROOT / "lfu_reg").rglob("*.py"), ROOT / "benchmarks" / "gpu" / "cuda_only.py"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_no_line_is_left_out(file: Path) -> None:
    source = file.read_text()
    quoted = [line for name, line in ROWS if name == file.relative_to(ROOT).as_posix()]
    documented = {number for node in ast.walk(ast.parse(source)) for number in docstring(node)}
    for number, line in enumerate(source.splitlines(), 1):
        code = line.split("  # ")[0]
        if number not in documented and ONLY_CUDA.search(code) and not code.lstrip().startswith("#"):
            assert any(text in line for text in quoted), f"{file.name}:{number} {line.strip()}"


def docstring(node: ast.AST) -> range:
    """The lines of a node's docstring."""
    documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
    if not documented or ast.get_docstring(node) is None:  # type: ignore[arg-type]
        return range(0)
    first = node.body[0]  # type: ignore[attr-defined]
    return range(first.lineno, first.end_lineno + 1)
