"""The full-scale protocol, end to end on the demo's small model and local data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from evidence.corpus import DATA
from paper import needs
from paper.data import MissingData, alpaca, training_examples
from paper.report import page
from paper.run import main
from paper.settings import MODELS, TABLES, Protocol
from paper.tasks import HARNESS, harness_tasks
from paper.train import settings_of

ROOT = Path(__file__).resolve().parents[2]
SMALL = str(ROOT / "benchmarks" / "demo" / "model")


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    file = tmp_path / "pairs.jsonl"
    rows = [{"instruction": f"Add {i} and {i}.", "input": "", "output": str(2 * i)} for i in range(20)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


def small(table: str, pairs: str, out: Path, *more: str) -> list[str]:
    return [table, "--model", "small", "--weights", SMALL, "--data", pairs, "--steps", "1", "--dtype", "float32",
            "--out", str(out), *more]  # fmt: skip


@pytest.mark.skipif(not DATA.exists(), reason="no public data")
def test_a_table_end_to_end(pairs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")
    call = small("table1", pairs, tmp_path, "--local", "--limit", "2", "--tasks", "piqa", "svamp", "--methods", "SFT",
                 "LoRA")  # fmt: skip
    assert main(call) == 0
    text = capsys.readouterr().out
    assert "parameters; disk" in text
    assert "| LfU (LoRA) |" in text
    files = sorted(tmp_path.rglob("pairs__*.json"))
    assert len(files) == 2
    records = [json.loads(f.read_text()) for f in files]
    assert {r["row"] for r in records} == {"SFT", "LfU (LoRA)"}
    assert all(r["steps"] == 1 and 0 <= r["scores"]["piqa"] <= 1 for r in records)
    # Finished rows are not repeated.
    before = [f.stat().st_mtime_ns for f in files]
    assert main(call) == 0
    assert [f.stat().st_mtime_ns for f in files] == before
    assert page(tmp_path).count("| SFT |") == 1


def test_adversarial_steps(pairs: str, tmp_path: Path) -> None:
    assert main(small("table4", pairs, tmp_path, "--methods", "SFT")) == 0
    (file,) = tmp_path.rglob("pairs__SFT.json")
    scores = json.loads(file.read_text())["scores"]
    # Which way it goes says nothing on a model that has never seen such a text; that the attack acted does.
    assert scores["refusal's nats after"] != pytest.approx(scores["refusal's nats before"], rel=1e-4)


def test_needs_are_said_before_anything_is_loaded(
    pairs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(small("table1", pairs, tmp_path, "--needs-only")) == 0
    assert "GB a process" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*__*.json"))


def test_needs_of_a_known_model() -> None:
    said = needs.needs_of(SMALL, TABLES["table1"], Protocol(), examples=100, tokens=50, processes=1, flops=1e12)
    assert said.parameters == pytest.approx(0.87e6, rel=0.02)
    sharded = needs.needs_of(SMALL, TABLES["table1"], Protocol(), examples=100, tokens=50, processes=2, flops=None)
    assert said.memory - sharded.memory == said.parameters
    assert sharded.seconds is None


def test_unknown_things(pairs: str, tmp_path: Path) -> None:
    with pytest.raises(MissingData, match="there are gsm8k"):
        training_examples("gsm9k")
    with pytest.raises(SystemExit, match="no such row; there are SFT"):
        main(small("table1", pairs, tmp_path, "--methods", "magic"))
    with pytest.raises(ValueError, match="unknown tasks lambda"):
        harness_tasks(["lambda"], local=True)


def test_settings_of_the_paper() -> None:
    lora = next(r for r in TABLES["table1"].rows if r.label == "LfU (LoRA)")
    steering = next(r for r in TABLES["table1"].rows if r.label == "LfU (RepS)")
    base, instruct = MODELS["llama-3.1-8b"], MODELS["llama-3.1-8b-instruct"]
    assert {k: settings_of(lora, base, Protocol())[k] for k in ("alpha", "lam")} == {"alpha": 0.1, "lam": 5.0}
    assert {k: settings_of(lora, instruct, Protocol())[k] for k in ("alpha", "lam")} == {"alpha": 0.001, "lam": 500.0}
    assert {k: settings_of(steering, instruct, Protocol())[k] for k in ("alpha", "lam")} == {"alpha": 0.1, "lam": 0.1}
    assert len(HARNESS) == 11


def test_template() -> None:
    assert alpaca("Do it.", "Done.").prompt.endswith("### Instruction:\nDo it.\n\n### Response:\n")
    assert "### Input:\nthis" in alpaca("Do it.", "Done.", "this").prompt
