"""Every script of docs/examples runs as it stands, learns, and is regularized by as much as the default promises.

Warnings of the library are errors. Scripts for several processes run in tests/distributed. The pages of docs/recipes
show the scripts, and no code besides.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.examples import PAGES, ROOT, SCRIPTS, blocks, filled, missing_packages, shown
from tests.support.acts import Steps, assert_acts, assert_learns

NOISY = {"dpo", "reward_model"}  # two epochs over sixteen pairs: the loss of a step is mostly its pairs'


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
@pytest.mark.filterwarnings("ignore::UserWarning")  # others' words on threads and pinned memory
@pytest.mark.filterwarnings("error::lfu_reg.LfUWarning")
def test_script_runs_and_acts(
    script: Path, steps: Steps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = script.read_text()
    if "torchrun" in code:
        checks = (ROOT / "tests" / "distributed" / f"checks_{script.stem}.py").read_text()
        assert f'run_example("{script.name}")' in checks
        pytest.skip(f"run by tests/distributed/checks_{script.stem}.py")
    if missing := missing_packages(code):
        pytest.skip(f"needs {', '.join(missing)}")
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    monkeypatch.chdir(tmp_path)
    code = code.replace('backend="inductor"', 'backend="eager"')  # a minute of compiling
    exec(compile(code, str(script), "exec"), {"__name__": "__main__"})
    assert_acts(steps, at_least=8)
    if script.stem not in NOISY:
        assert_learns(steps)
    printed = re.findall(r"gradient ratio ([\d.]+) \(good: 0\.1-10\)", capsys.readouterr().out)
    assert len(printed) >= 4
    assert all(0.1 <= float(ratio) <= 10 for ratio in printed)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_shows_its_script(page: Path) -> None:
    """`python -m tests.docs.examples` writes it."""
    text = page.read_text()
    assert len(shown(text)) == len(blocks(text)) == 1
    assert filled(text) == text


def test_every_script_has_a_page_and_every_page_is_listed() -> None:
    assert sorted(name for page in PAGES for name in shown(page.read_text())) == [script.name for script in SCRIPTS]
    navigation, table = (ROOT / "mkdocs.yml").read_text(), (ROOT / "docs" / "recipes.md").read_text()
    for page in PAGES:
        assert f"recipes/{page.name}" in navigation, page.name
        assert f"recipes/{page.name}" in table, page.name
