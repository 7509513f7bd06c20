"""The pages name tests and files that exist, and the failure table has every row."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import lfu_reg

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
TABLE = ROOT / "docs" / "failure-modes.md"
ROWS = 42

_TEST = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT / "docs")))
def test_named_tests_exist(page: Path) -> None:
    for file, name in _TEST.findall(page.read_text()):
        assert (ROOT / file).exists(), f"{file} does not exist"
        if name:
            assert re.search(rf"def {name}\b", (ROOT / file).read_text()), f"{file} has no {name}"


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    missing = [str(p.relative_to(ROOT / "docs")) for p in PAGES if str(p.relative_to(ROOT / "docs")) not in navigation]
    assert not missing


def test_every_public_name_is_in_the_api_page() -> None:
    """And nothing else is; what comes with an extra is looked for in its source."""
    documented = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "api.md").read_text(), flags=re.MULTILINE)
    integrations = {name for name in documented if name.startswith("lfu_reg.integrations.")}
    assert {f"lfu_reg.{name}" for name in lfu_reg.__all__} == set(documented) - integrations
    for name in integrations:
        module, _, attribute = name.rpartition(".")
        source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
        assert re.search(rf"^class {attribute}\b", source, re.MULTILINE), name
    assert {"LfUTrainer", "LfUSFTTrainer", "LfUCallback"} <= {name.rpartition(".")[2] for name in integrations}


@pytest.mark.parametrize("name", lfu_reg.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    """It, and what can be called on it, have a docstring of their own or of a class that they derive from."""
    public = getattr(lfu_reg, name)
    assert inspect.getdoc(public)
    for attribute, value in inspect.getmembers(public):
        if not attribute.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
            assert inspect.getdoc(value) or inspect.getdoc(getattr(public, attribute)), f"{name}.{attribute}"


def test_the_failure_table_has_a_test_in_every_row() -> None:
    rows = re.findall(r"^\| (\d+) \|(.*)$", TABLE.read_text(), flags=re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, ROWS + 1))
    assert all(_TEST.search(row) for _, row in rows)
