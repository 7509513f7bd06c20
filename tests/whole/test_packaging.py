"""What a package page shows, and that messages name extras that there are."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text()


@pytest.fixture
def hatch_build() -> ModuleType:
    pytest.importorskip("hatchling")
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("repository", ["", "https://git.test/a/b"])
def test_links_of_a_package_page_leave_the_repository(hatch_build: ModuleType, repository: str) -> None:
    page = hatch_build.readme_for_a_package_page((ROOT / "README.md").read_text(), repository)
    targets = re.findall(r"\]\(([^)\s]+)\)", page) + re.findall(r'(?:src|srcset)="([^"]+)"', page)
    assert all(target.startswith(("https://", "#")) for target in targets), targets
    assert "https://arxiv.org/abs/2511.13052" in targets
    assert any(target.startswith("https://git.test") for target in targets) == bool(repository)


def test_links_with_and_without_a_repository(hatch_build: ModuleType) -> None:
    text = '[a](docs/a.md#b), ![p](docs/p.png), [c](https://d.test), [e](#f) <img src="g.png">'
    made = hatch_build.readme_for_a_package_page(text, "https://git.test/r")
    blob, raw = "https://git.test/r/blob/HEAD/docs/a.md#b", "https://git.test/r/raw/HEAD"
    assert made == f'[a]({blob}), ![p]({raw}/docs/p.png), [c](https://d.test), [e](#f) <img src="{raw}/g.png">'
    assert hatch_build.readme_for_a_package_page(text, "") == "a, p, [c](https://d.test), [e](#f) "


def test_messages_name_extras_that_exist() -> None:
    named = {
        extra
        for file in (ROOT / "lfu_reg").rglob("*.py")
        for extra in re.findall(r"pip install 'lfu_reg\[(\w+)\]'", file.read_text())
    }
    assert {"hf", "trl", "lightning", "cli"} <= named
    assert all(re.search(rf"^{extra} = \[", PYPROJECT, re.MULTILINE) for extra in named)


def test_the_oldest_versions_are_those_that_nox_runs() -> None:
    noxfile = (ROOT / "noxfile.py").read_text()
    for package in ("torch", "transformers", "peft", "accelerate"):
        oldest = re.search(rf'"{package}>=([\d.]+)"', PYPROJECT)
        run = re.search(rf'"{package}==([\d.]+)"', noxfile)
        assert oldest, package
        assert run, package
        assert run[1].startswith(oldest[1]), package
