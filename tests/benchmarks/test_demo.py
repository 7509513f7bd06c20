"""The demo is a call of `lfu-reg compare`: what it calls it with, and where its model comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

from demo import __main__ as demo
from demo.load import EMBEDDED_MODEL
from demo.skills import TUNED_SKILL

from lfu_reg.cli import app as app_module
from lfu_reg.cli.compare.rows import read_rows


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "CACHE", tmp_path / "models" / "SmolLM2")
    return tmp_path


def test_without_the_real_model_the_small_one_takes_its_place(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None if name == "gguf" else True)
    assert demo.real_model() is None
    assert "cannot be had: gguf could not be installed" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.chdir(here)
    monkeypatch.setattr(demo, "real_model", lambda: None)
    quick = ["--steps", "2", "--rates", "2e-3", "--strengths", "1", "--seeds", "1", "--held-out", "8", "--threads", "1"]
    with pytest.raises(SystemExit) as ended:
        demo.main(quick)
    assert ended.value.code == 0
    rows = [json.loads(line) for line in (here / "runs/demo/runs.jsonl").read_text().splitlines()]
    assert [row["run"] for row in rows] == ["base", "sft_rate-0.002_seed-0", "lfu-1-exact_rate-0.002_seed-0"]
    assert 0.1 <= rows[2]["figures"]["gradient_ratio"] <= 10
    assert rows[0]["point"]["kept"]["old-skills.jsonl"]["exact"] == 1.0
    assert "Verdict: LfU adds nothing here, since SFT forgets next to nothing." in capsys.readouterr().out


def test_the_real_model_is_converted_once(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paper = pytest.importorskip("paper.smollm2")
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: True)

    def fails(folder: Path) -> None:
        (folder / "half").touch()
        raise OSError("no space left")

    monkeypatch.setattr(paper, "convert", fails)
    assert demo.real_model() is None
    assert "its conversion failed (no space left)" in capsys.readouterr().out
    monkeypatch.setattr(paper, "convert", lambda folder: (folder / "config.json").write_text("{}"))
    assert demo.real_model() == demo.CACHE
    assert not (demo.CACHE / "half").exists()
    monkeypatch.setattr(paper, "convert", fails)
    assert demo.real_model() == demo.CACHE


def test_both_calls_are_commands_that_exist(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(app_module, "app", calls.append)
    for model in (here, None):
        monkeypatch.setattr(demo, "real_model", lambda model=model: model)
        demo.main(["--seeds", "2"])
    real, small = calls
    assert real[1] == str(here)
    assert small[1] == str(EMBEDDED_MODEL)
    for call in calls:
        assert call[0] == "compare"
        assert call[-2:] == ["--seeds", "2"]
        assert all(Path(part).exists() for part in call[1:] if part.endswith((".jsonl", ".txt")))


def test_rows_that_ship_are_enough() -> None:
    options = dict(zip(demo.REAL[::2], demo.REAL[1::2], strict=True))
    count = len(read_rows("DATA", demo.DATA / "svamp.jsonl").rows)
    assert count >= int(options["--train"]) + int(options["--held-out"])
    assert len(read_rows("--keep", demo.DATA / "lambada.jsonl").rows) >= int(options["--held-out"])
    assert (demo.DATA / "SVAMP-MIT.txt").exists()
    assert TUNED_SKILL == "subtract"  # as the file of its rows is called
