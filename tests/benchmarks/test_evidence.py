"""The machinery of the evidence: grids of equal size, choice on validation data, paired verdicts, resumable results."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from evidence import report, run, store
from evidence.experiments import EXPERIMENTS, chosen
from evidence.finetune import Spec, finetuned
from evidence.finetune import run as run_one
from evidence.grids import ENTRIES, PAPER, tuning_specs
from evidence.measure import with_score
from evidence.paired import difference, estimate
from evidence.robustness import cosines_under_noise
from evidence.tasks import TASKS, old_skills
from evidence.verdicts import claims

from tests.benchmarks.one_process import in_one_process

QUICK = replace(TASKS["subtract-16"], steps=2)


def row(label: str, seed: int, score: float, **more: Any) -> dict[str, Any]:
    spec = Spec("compare-skills", "subtract-128", "sft", label, seed=seed)
    figures = {"score": score, "in_domain": score, "variation_mean": 0.5, "variation_spread": 0.1, "retention": 0.9}
    return {**spec.__dict__, **figures, "train_seconds": 1.0, "commit": "abc", "date": "2026-01-01", **more}


def test_every_method_is_tuned_with_the_same_budget() -> None:
    assert {len(entry.cells()) for entry in ENTRIES.values()} == {9}
    assert all(len(set(entry.cells())) == 9 for entry in ENTRIES.values())


def test_tuning_sees_validation_data_and_other_seeds_only() -> None:
    specs = tuning_specs(["SFT"], "tune", ["subtract-128"], range(100, 102))
    assert {s.split for s in specs} == {"validation"}
    assert {s.seed for s in specs}.isdisjoint(range(5))
    assert len(specs) == 18


def test_the_best_mean_over_tasks_is_chosen() -> None:
    cells = ENTRIES["SAM"].cells()[:2]
    rows = [
        {**replace(cell, experiment="tune", task=task, seed=100, split="validation").__dict__, "score": score}
        for cell, scores in zip(cells, ((0.9, 0.1), (0.6, 0.6)), strict=True)
        for task, score in zip(("a", "b"), scores, strict=True)
    ]
    best = chosen(rows, "tune")["SAM"]
    assert (best.settings, best.lr) == (cells[1].settings, cells[1].lr)
    assert chosen(rows, "other") == {}


def test_paired_differences() -> None:
    found = difference([1.0, 2.0, 3.5], [0.5, 1.0, 2.0])
    assert found.mean == pytest.approx(1.0)
    # Student's t with 2 degrees of freedom: t = 1 / (0.5 / sqrt(3))
    t = 1.0 / (0.5 / math.sqrt(3))
    assert found.p == pytest.approx(1 - t / math.sqrt(t * t + 2), rel=1e-6)
    assert difference([1.0, 1.0], [1.0, 1.0]).p == 1.0
    assert estimate([1.0, 2.0, 3.0]).half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-5)


def test_verdicts() -> None:
    claim = next(c for c in claims() if c.hypothesis == "b" and c.better == "LfU LoRA" and c.worse == "SFT")
    better = [row("LfU LoRA", s, 0.5, retention=0.9 + 0.01 * s) for s in range(5)]
    worse = [row("SFT", s, 0.5, retention=0.8 + 0.011 * s) for s in range(5)]
    found = claim.on([*better, *worse], "compare-skills", "subtract-128")
    assert found is not None
    assert claim.verdict(found) == "supported"
    turned = claim.on(
        [{**r, "retention": 1 - r["retention"]} for r in (*better, *worse)], "compare-skills", "subtract-128"
    )
    assert turned is not None
    assert claim.verdict(turned) == "contradicted"
    assert claim.on(better, "compare-skills", "subtract-128") is None


def test_a_smaller_spread_counts_as_better() -> None:
    claim = next(c for c in claims() if c.hypothesis == "c" and c.better == "LfU LoRA")
    rows = [row("LfU LoRA", s, 0.5, variation_spread=0.1 + 0.001 * s) for s in range(4)]
    rows += [row("SFT", s, 0.5, variation_spread=0.2 + 0.002 * s) for s in range(4)]
    found = claim.on(rows, "compare-skills", "subtract-128")
    assert found is not None
    assert claim.verdict(found) == "supported"


def test_retention_is_a_share_of_what_the_base_model_knew() -> None:
    result = {"in_domain": 0.6, "variation_mean": 0.3, "accuracy/add": 0.4, "nll/novels": 4.0, "ranked/piqa": 0.1}
    base = {"accuracy/add": 0.8, "nll/novels": 2.0, "ranked/piqa": 0.9}
    scored = with_score(result, base)
    assert scored["retention"] == pytest.approx(0.5)
    assert scored["score"] == pytest.approx((0.6 + 0.3 + 0.5) / 3)


def test_results_are_appended_and_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "evidence.jsonl"
    specs = [Spec("quick", "subtract-128", "sft", "SFT", seed=s) for s in range(3)]
    store.append(specs[1], {"score": 1 / 3}, "abc", file)
    (kept,) = store.rows(file)
    assert store.spec_of(kept) == specs[1]
    assert kept["score"] == 0.33333
    assert kept["commit"] == "abc"

    started: list[Spec] = []

    def scored(work: Any, jobs: list[tuple[Spec, str]]) -> Any:
        for spec, at in jobs:
            started.append(spec)
            yield spec, at, {"score": 0.5}

    in_one_process(monkeypatch, scored)
    monkeypatch.setattr(store, "RESULTS", file)
    monkeypatch.setattr(run.store, "rows", lambda: [kept])
    monkeypatch.setattr(run.store, "append", lambda *a: None)
    monkeypatch.setitem(EXPERIMENTS, "quick", lambda rows: specs)
    run.perform("quick", workers=1)
    assert started == [specs[0], specs[2]]


def test_unknown_experiments_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["tune-skulls"])
    assert "there are tune-skills" in capsys.readouterr().err


@pytest.mark.parametrize("label", ["LfU LoRA", "R-Drop"])
def test_one_run(label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "subtract-16", QUICK)
    cell = replace(ENTRIES[label].cells()[0], experiment="quick", task="subtract-16", seed=1, split="validation")
    figures = run_one(cell)
    assert {"score", "retention", "in_domain", "variation_spread", "train_nll", "train_seconds"} <= set(figures)
    assert 0 <= figures["retention"] <= 1.2
    assert figures == pytest.approx({**run_one(cell), "train_seconds": figures["train_seconds"]})
    json.dumps(figures)


@pytest.mark.parametrize("method", ["stm", "flow", "wise-ft", "extra-gradient", "steering-only"])
def test_rivals_are_chosen_by_name(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "subtract-16", QUICK)
    nll = [finetuned(Spec("quick", "subtract-16", name, name))[1]["train_nll"] for name in ("sft", method)]
    assert nll[0] != nll[1] > 0


def test_noise_moves_hidden_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "subtract-16", QUICK)
    spec = Spec("noise", "subtract-16", "sft", "SFT", split="validation")
    model, _ = finetuned(spec)
    figures = cosines_under_noise(model, spec)
    assert len([name for name in figures if name.startswith("cosine/")]) == 4
    assert 0.2 < figures["cosine"] < 0.99999
    assert not any(m._forward_hooks for m in model.modules())


def test_held_out_items_are_held_out() -> None:
    task = TASKS["subtract-128"]
    trained = {e.prompt for e in task.train(0)}
    for split in ("validation", "test"):
        assert trained.isdisjoint(e.prompt for e in task.held_out(split)[0])
    assert {e.prompt for e in task.held_out("test")[0]}.isdisjoint(e.prompt for e in task.held_out("validation")[0])
    assert "subtract" not in old_skills("skills", "test")


def test_the_page_names_every_method_and_its_provenance() -> None:
    labels = ("SFT", "NEFTune", "LfU LoRA", "LfU steering", PAPER[0].label)
    data = [
        row(label, seed, 0.5 + 0.01 * i + 0.001 * seed * (i + 1)) for i, label in enumerate(labels) for seed in range(5)
    ]
    text = report.page(data)
    assert all(f"| {label} |" in text for label in labels)
    assert "commits abc" in text
    assert "`make evidence-again`" in text
    assert "supported" in text
    assert "| SFT | 0.502 ± " in text
