"""CONTRIBUTING.md's map has exactly the modules that exist; its commands exist; the citation has the version."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import lfu_reg

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()


def listed() -> dict[str, list[str]]:
    """The map: folder to files, each of them with something said about it."""
    (block,) = re.findall(r"^```text\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    found: dict[str, list[str]] = {}
    for line in filter(None, block.split("\n")):
        match = re.fullmatch(r"(?:(lfu_reg/\S*)|  (\S+\.py)) {2,}\S.*", line)
        assert match, f"not a line of the map: {line!r}"
        folder, file = match.groups()
        if folder:
            here = found.setdefault(folder, [])
        else:
            here.append(file)
    return found


def existing() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for file in sorted((ROOT / "lfu_reg").rglob("*.py")):
        here = found.setdefault(f"{file.parent.relative_to(ROOT).as_posix()}/", [])
        if file.name != "__init__.py":
            here.append(file.name)
    return found


def test_the_map_has_every_folder() -> None:
    assert set(listed()) == set(existing())


@pytest.mark.parametrize("folder", listed())
def test_the_map_has_every_file(folder: str) -> None:
    assert listed()[folder] == sorted(listed()[folder])
    missing = set(existing()[folder]) - set(listed()[folder])
    gone = set(listed()[folder]) - set(existing()[folder])
    assert not missing | gone, f"not in the map: {sorted(missing)}; in the map, but not there: {sorted(gone)}"


def test_commands_and_paths_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make ([\w-]+)`", PAGE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for path in re.findall(r"\b((?:tests|docs|lfu_reg|benchmarks)/[\w/]+\.\w+)", PAGE):
        assert (ROOT / path).exists(), path
    for file, name in re.findall(r"\b(tests/[\w/]+\.py)::(\w+)", PAGE):
        assert re.search(rf"def {name}\b", (ROOT / file).read_text()), name
    for name in re.findall(r"\bcheck_\w+", PAGE):
        assert f"def {name}" in (ROOT / "tests/distributed/checks_ddp.py").read_text(), name


def test_the_citation_has_the_version() -> None:
    assert f"\nversion: {lfu_reg.__version__}\n" in (ROOT / "CITATION.cff").read_text()
