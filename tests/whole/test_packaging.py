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
    dark = f'media="(prefers-color-scheme: dark)" srcset="{repository}/raw/HEAD/docs/figures/front-dark.svg"'
    assert (dark in page) == ("intervals of the difference" in page) == bool(repository)  # the figure and its caption


def test_links_with_and_without_a_repository(hatch_build: ModuleType) -> None:
    text = '[a](docs/a.md#b), ![p](docs/p.png), [c](https://d.test), [e](#f) <img src="g.png">'
    made = hatch_build.readme_for_a_package_page(text, "https://git.test/r")
    blob, raw = "https://git.test/r/blob/HEAD/docs/a.md#b", "https://git.test/r/raw/HEAD"
    assert made == f'[a]({blob}), ![p]({raw}/docs/p.png), [c](https://d.test), [e](#f) <img src="{raw}/g.png">'
    assert hatch_build.readme_for_a_package_page(text, "") == "a, p, [c](https://d.test), [e](#f) "


def test_installing_is_said_in_one_form() -> None:
    """`pip install .` on the first pages, and from then on `pip install 'lfu_reg[EXTRA]'`, which adds to what is there.

    pip takes the package that is installed, whether it came from an index or from a folder.
    """
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "lfu_reg").rglob("*.py")]
    commands = {page: re.findall(r"pip install ((?:\\?'[^']*'|[^\s`\"])+)", page.read_text()) for page in pages}
    plain = {str(page.relative_to(ROOT)) for page, found in commands.items() if "." in found}
    assert plain == {"README.md", "docs/index.md"}
    extras = set()
    for page, found in commands.items():
        for command in set(found) - {"."}:
            match = re.fullmatch(r"'lfu_reg\[(\w+)\]'[.,;:)]*", command)
            assert match, f"{page.relative_to(ROOT)}: pip install {command}"
            extras.add(match[1])
    assert {"hf", "trl", "lightning", "cli", "compare", "plot", "triton"} <= extras
    assert all(re.search(rf"^{extra} = \[", PYPROJECT, re.MULTILINE) for extra in extras)


def test_the_oldest_versions_are_those_that_nox_runs() -> None:
    noxfile = (ROOT / "noxfile.py").read_text()
    for package in ("torch", "transformers", "peft", "accelerate"):
        oldest = re.search(rf'"{package}>=([\d.]+)"', PYPROJECT)
        run = re.search(rf'"{package}==([\d.]+)"', noxfile)
        assert oldest, package
        assert run, package
        assert run[1].startswith(oldest[1]), package
