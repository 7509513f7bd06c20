"""Every page in docs/recipes runs: its python blocks in order, in one namespace, warnings of the library being errors.

A page says what it needs in a comment, `<!-- recipe: needs=trl,datasets -->`, and is skipped where that is missing. A
page for several processes names the test that runs it:
`<!-- recipe: test=tests/integrations/test_launched_loops.py -->`.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs" / "recipes").glob("*.md"))


def markers(text: str) -> dict[str, str]:
    pairs = [pair for comment in re.findall(r"<!-- recipe: (.*?) -->", text) for pair in comment.split()]
    return dict(pair.split("=", 1) for pair in pairs)


def blocks(text: str) -> list[str]:
    """The python blocks, each behind as many empty lines as stand before it, so that tracebacks point into the page."""
    found = re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return ["\n" * text[: block.start(1)].count("\n") + block.group(1) for block in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
def test_recipe_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = page.read_text()
    marks = markers(text)
    assert set(marks) <= {"needs", "test"}, marks
    if "test" in marks:
        assert page.name in (ROOT / marks["test"]).read_text(), f"{marks['test']} does not run {page.name}"
        pytest.skip(f"run by {marks['test']}")
    for package in marks.get("needs", "").split(","):
        if package and find_spec(package) is None:
            pytest.skip(f"needs {package}")
    assert blocks(text), "a recipe without code"
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "recipe"}
    for block in blocks(text):
        exec(compile(block, str(page), "exec"), names)


def test_every_recipe_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in PAGES:
        assert f"recipes/{page.name}" in navigation, page.name
