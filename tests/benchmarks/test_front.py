"""The figure of the README is what its script draws from the result files."""

from __future__ import annotations

import importlib
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest

pytest.importorskip("scipy")
pytest.importorskip("peft")

from evidence.finetune import Spec
from study.tasks import HEADLINE

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def front(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("front.__main__")


def test_the_figure_is_what_was_measured(front: ModuleType) -> None:
    shown = front.panels()
    readme = (ROOT / "README.md").read_text()
    assert front.filled(readme, shown) == readme, "run `python -m front` in benchmarks/"
    home = (ROOT / "docs" / "index.md").read_text()
    assert front.filled_home(home, shown) == home, "run `python -m front` in benchmarks/"
    for name, picture in front.files(shown).items():
        assert (ROOT / "docs" / "figures" / name).read_text() == picture, "run `python -m front` in benchmarks/"
        assert name in readme
        assert f"{name}#only-" in home
        assert ElementTree.fromstring(picture).tag.endswith("svg")
    assert "<!-- figure -->\n<picture>" in readme


def study(label: str, seed: int, points: dict[float, tuple[float, float]], rate: float = 1e-3) -> dict[str, Any]:
    made = [{"scale": s, "domain": {"loss": x}, "kept": {"text": {"loss": 3 + y}}} for s, (x, y) in points.items()]
    method = {"base model": "base", "SFT": "sft", "KL to base": "kl-to-base"}.get(label, "lfu")
    return {**asdict(Spec("headline", HEADLINE, method, label, lr=rate, seed=seed)), "points": made}


def test_a_study_is_shown_once_it_has_enough_seeds(front: ModuleType) -> None:
    panels = importlib.import_module("front.panels")
    base = {**study("base model", 0, {0.0: (6.0, 0.0)}), "experiment": "base"}
    validation = {"split": "validation"}
    tuned = {**study("SFT", 100, {1.0: (3.0, 0.4)}), **validation, "experiment": "tune"}
    rows = [base, {**base, **validation}, tuned]
    for seed in range(panels.ENOUGH_SEEDS):
        assert panels.studied(rows) is None
        rows.append(study("SFT", seed, {0.5: (4.0, 0.1), 1.0: (3.0, 0.4 + 0.01 * seed)}))
        rows.append(study("SFT", seed, {1.0: (5.0, 0.1)}, rate=1e-4))  # learns less, so tuning chose the other one
        rows += [study(label, seed, {1.0: (3.1, 0.3)}) for label in ("LfU LoRA", "KL to base")]
        rows.append(study("LfU steering", seed, {1.0: (3.2, 0.2 + 0.01 * seed)}))
    panel = panels.studied(rows)
    assert panel == panels.benefit([], rows)
    values = {bar.label: bar.value for bar in panel.bars}
    expected = {"SFT": 0.42, "SFT, adapter x 0.5": 0.1, "LfU steering": 0.22, "LfU LoRA": 0.3, "KL to base": 0.3}
    assert values == pytest.approx(expected)
    assert [bar.note for bar in panel.bars] == ["loss 3.00", "loss 4.00", "loss 3.20", "loss 3.10", "loss 3.10"]
    intervals = {bar.label: bar.half_width for bar in panel.bars}
    assert intervals["SFT"] == 0
    assert intervals["LfU steering"] == pytest.approx(0, abs=1e-9)  # the difference is the same with every seed
    assert intervals["LfU LoRA"] > 0.01
