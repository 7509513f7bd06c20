"""docs/quick-start.md runs as it stands, and acts, with the model that ships in place of the one of the hub."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.examples import ROOT, blocks
from tests.support.acts import Steps, assert_acts

PAGE = ROOT / "docs" / "quick-start.md"
NAME = '"HuggingFaceTB/SmolLM2-135M-Instruct"'


def test_quick_start_runs_and_acts(steps: Steps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("transformers", "accelerate", "trl", "datasets"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    first, loop, *trainers = blocks(PAGE.read_text())
    assert NAME in first
    names: dict[str, object] = {"__name__": "quick_start"}
    ships = str(ROOT / "benchmarks" / "evidence" / "base_model")
    exec(compile(first.replace(NAME, repr(ships)), str(PAGE), "exec"), names)
    exec(compile(loop, str(PAGE), "exec"), names)
    assert_acts(steps, at_least=4)
    assert len(trainers) == 2
    for block in trainers:
        steps.clear()
        exec(compile(block, str(PAGE), "exec"), names)
        assert_acts(steps)
        assert 0.1 <= names["trainer"].state.log_history[0]["lfu/gradient_ratio"] <= 10  # type: ignore[attr-defined]
