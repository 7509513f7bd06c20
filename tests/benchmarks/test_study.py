"""The study: what is run and what is skipped, the distance to SFT's curve, and that pages have what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft")
pytest.importorskip("matplotlib")

from demo.skills import Example
from evidence import store, tasks
from evidence.finetune import Spec
from evidence.paired import estimate
from study import __main__ as program
from study import cells, page, runs, tables
from study.analysis import Answer, Judged, answers
from study.tasks import HEADLINE, LARGE, LARGE_OTHERS, Battery

from lfu_reg.cli.compare.encoding import Tokens

Points = Sequence[tuple[float, float, float]]  # scale, domain loss, loss on what is to be kept
START = (0.0, 2.0, 1.0)


def row(label: str, method: str, points: Points, *, lr: float = 1e-3, seed: int = 0, **more: Any) -> dict[str, Any]:
    spec = Spec("headline", HEADLINE, method, label, lr=lr, seed=seed)
    scored = [
        {"scale": scale, "domain": {"loss": x}, "kept": {"text": {"loss": y}}, "kl": 0.1} for scale, x, y in points
    ]
    return {**asdict(spec), "points": scored, "cosine": 0.9, "variations": 1.0, **more}


def base(task: str = HEADLINE) -> dict[str, Any]:
    return row("base model", "base", [START], lr=0.0, experiment="base", task=task)


# A seed of SFT at two rates: from the base model at (2, 0) by (1.5, .1) to (1, .4), and to (.8, 1).
SFT = [
    row("SFT", "sft", [(0.5, 1.5, 1.1), (1.0, 1.0, 1.4)], lr=1e-3),
    row("SFT", "sft", [(0.5, 1.4, 1.5), (1.0, 0.8, 2.0)], lr=4e-3),
]


def test_the_gap_is_what_the_curve_forgets_more_at_equal_loss() -> None:
    judged = Judged.of([base(), *SFT], HEADLINE)
    # Half way between the scales .5 and 1 of the small rate SFT is at (1.25, .25).
    mine = [row("LfU", "lfu", [(1.0, 1.26, 1.05)])]
    assert judged.gaps(mine)[0] == pytest.approx(0.25 - 0.05, abs=0.013)
    # Over rates alone: a straight line from the base model (2, 0) to (1, .4) passes (1.25, .3).
    assert judged.gaps(mine, by_scale=False)[0] == pytest.approx(0.3 - 0.05, abs=0.02)
    # Whoever learns better than SFT ever does is compared with SFT at its best.
    assert judged.gaps([row("LfU", "lfu", [(1.0, 0.5, 1.7)])])[0] == pytest.approx(1.0 - 0.7)
    assert judged.gaps(SFT[:1])[0] == pytest.approx(0.0)
    assert judged.gaps(mine, scale=0.75) == {}


def test_a_seed_counts_when_all_rates_have_run() -> None:
    mine = [row("LfU", "lfu", [(1.0, 1.2, 1.0)], seed=seed) for seed in range(2)]
    later = row("SFT", "sft", [(1.0, 1.0, 1.4)], seed=1)
    judged = Judged.of([base(), *SFT, *mine, later], HEADLINE)
    assert judged.gaps(judged.first("LfU")).keys() == {0}
    more = row("SFT", "sft", [(1.0, 0.9, 1.4)], seed=1, lr=4e-3)
    judged = Judged.of([base(), *SFT, *mine, later, more], HEADLINE)
    assert judged.gaps(judged.first("LfU")).keys() == {0, 1}


def test_verdicts_follow_the_intervals() -> None:
    def found(*values: float) -> str:
        return Answer("1", "", HEADLINE, estimate(values)).verdict

    assert found(0.1, 0.11, 0.12) == "supported"
    assert found(-0.1, -0.11, -0.12) == "contradicted"
    assert found(-0.1, 0.11, 0.12) == "open"
    assert found(0.1) == "one seed"
    assert Answer("1", "", HEADLINE, None).verdict == "not run"


def test_every_method_gets_the_same_rates() -> None:
    specs = [spec for spec in cells.tune([]) if spec.experiment == "tune"]
    assert {label: sum(spec.label == label for spec in specs) for label in cells.ENTRIES} == dict.fromkeys(
        cells.ENTRIES, 3
    )
    assert {spec.split for spec in specs} == {"validation"}
    assert cells.TUNING_SEED not in range(cells.SEEDS)


def test_the_lowest_sum_is_chosen_and_then_judged_on_test_data() -> None:
    start = base() | {"split": "validation"}
    tuned = [start]
    for spec in cells.tune([])[2:]:
        x = 1.0 if spec.lr in (2e-3, 1e-1) else 1.5
        tuned.append(row("", "", [(1.0, x, 1.1)]) | asdict(spec))
    assert cells.headline(tuned[:-9]) == []
    assert {spec.lr for label, spec in cells.chosen(tuned, HEADLINE).items() if label != "steering-only"} == {2e-3}
    specs = cells.headline(tuned)
    assert len({spec.key() for spec in specs}) == len(specs)
    assert [spec.seed for spec in specs] == sorted(spec.seed for spec in specs)
    assert {spec.split for spec in specs} == {"test"}
    assert {spec.label for spec in specs if spec.seed == 9} == {"SFT", *cells.MAIN}


def test_on_the_large_model_every_method_is_judged_at_a_rate_of_its_own() -> None:
    tuning = cells.large_tuned([])
    assert {(spec.experiment, spec.split, spec.seed) for spec in tuning} == {("tune", "validation", cells.TUNING_SEED)}
    labels = {*cells.LARGE_MAIN, *cells.LARGE_RIVALS}
    assert {(spec.label, spec.lr) for spec in tuning} == {
        (label, rate) for label in labels for rate in cells.LARGE_RATES
    }
    bases = [base(LARGE) | {"split": split} for split in ("validation", "test")]
    sft = [asdict(replace(cells.cells("SFT")[0], experiment="tune", task=LARGE, split="validation", seed=100))]
    suits = {spec.label: 1e-3 if spec.label == "KL to base" else 2e-3 for spec in tuning}
    rows = bases + [
        row("", "", [(1.0, 1.0 if found["lr"] == suits.get(found["label"], 1e-3) else 1.5, 1.1)]) | found
        for found in [*sft, *map(asdict, tuning)]
    ]
    assert cells.large_tuned(rows[:-1]) == tuning
    tests = [spec for spec in cells.large_tuned(rows) if spec not in tuning]
    assert {(spec.label, spec.lr) for spec in tests} == set(suits.items())
    assert [spec.seed for spec in tests] == sorted(spec.seed for spec in tests)
    assert {spec.label for spec in tests if spec.seed == cells.SEEDS - 1} == set(cells.LARGE_MAIN)
    # What ran at SFT's rate is judged again where that is a method's own, and is not run again.
    assert {spec.label for spec in tests if spec in cells.large(rows)} == {"KL to base"}
    rows += [row("", "", [(1.0, 1.2, 1.1)]) | asdict(spec) for spec in [*cells.large(rows), *tests]]
    judged = Judged.of(rows, LARGE)
    assert {r["lr"] for r in judged.first("LfU LoRA")} == {1e-3}
    assert {r["lr"] for r in judged.tuned("LfU LoRA")} == {2e-3}
    assert judged.tuned("SAM") == []


def tuned_rows(specs: Sequence[Spec], best: float) -> list[dict[str, Any]]:
    """What a run of each would have left behind, with the lowest loss at one rate."""
    return [row("", "", [(1.0, 1.0 if spec.lr == best else 1.5, 1.1)]) | asdict(spec) for spec in specs]


def test_other_tasks_of_the_large_model_are_judged_once_their_rates_are_tuned() -> None:
    tuning = cells.large_others([])
    assert {spec.task for spec in tuning} == set(LARGE_OTHERS)
    assert {spec.split for spec in tuning if spec.method != "base"} == {"validation"}
    first = [spec for spec in tuning if spec.task == LARGE_OTHERS[0]]
    rows = [base(LARGE_OTHERS[0]) | {"split": split} for split in ("validation", "test")]
    rows += tuned_rows([spec for spec in first if spec.method != "base"], 2e-3)
    assert cells.large_others(rows[:-1]) == tuning
    tests = [spec for spec in cells.large_others(rows) if spec not in tuning]
    assert {(spec.task, spec.split) for spec in tests} == {(LARGE_OTHERS[0], "test")}
    assert {spec.lr for spec in tests if spec.label != "SFT"} == {2e-3}
    assert {spec.lr for spec in tests if spec.label == "SFT"} == set(cells.LARGE_RATES)
    assert all(len(cells.scales(spec)) == (3 if spec.label == "SFT" else 1) for spec in tests)


def test_runs_for_accuracies_do_not_count_twice() -> None:
    rows = [base(LARGE) | {"split": split} for split in ("validation", "test")]
    sft = replace(cells.cells("SFT")[0], experiment="tune", task=LARGE, split="validation", seed=100)
    rows += tuned_rows([*cells.large_tuned([]), sft], 1e-3)
    before = Judged.of(rows, LARGE)
    again = cells.large_accuracy(rows)
    assert {spec.label for spec in again} == {"base model", "SFT", *cells.LARGE_MAIN}
    assert all(cells.scales(spec) == (1.0,) for spec in again if spec.method == "sft")
    assert Judged.of(rows + tuned_rows(again, 1e-3), LARGE).rows == before.rows
    ran = [one | {"ranked": {"piqa": 0.5 + 0.1 * one["seed"], "winogrande": 0.5}} for one in tuned_rows(again, 1e-3)]
    assert "| SFT | +0.100 ± 0.248 (3) | +0.000 ± 0.000 (3) |" in tables.accuracy(ran)


def test_what_has_run_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "study.jsonl"
    specs = [Spec("quick", HEADLINE, "sft", "SFT", seed=seed) for seed in range(3)]
    # The last one is known only when the others have run, as what tuning chooses.
    monkeypatch.setitem(cells.STAGES, "quick", lambda rows: specs[: 2 + (len(rows) >= 2)])
    started: list[int] = []

    def figures(spec: Spec) -> dict[str, Any]:
        started.append(spec.seed)
        return {"points": [{"scale": 1.0, "kl": 1 / 3}]}

    monkeypatch.setattr(program, "figures", figures)
    program.perform("quick", lambda spec: spec.seed != 1, file)
    assert started == [0]
    program.perform("quick", lambda spec: True, file)
    assert started == [0, 1, 2]
    program.perform("quick", lambda spec: True, file)
    assert started == [0, 1, 2]
    rows = store.rows(file)
    assert [store.spec_of(r) for r in rows] == specs
    assert rows[0]["points"] == [{"scale": 1.0, "kl": 0.33333}]
    assert {"commit", "benchmarks", "command", "torch", "seconds"} <= set(rows[0])


def test_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = [Example("Question: one and one\nAnswer: ", word) for word in ("two", "three", "four", "five")]
    quick = replace(
        tasks.TASKS["subtract-16"], base="text", train=lambda seed: examples, held_out=lambda s: (examples, []), steps=2
    )
    few = [Tokens((5, 6, 7, 8), 2), Tokens((9, 10, 11), 1)]
    monkeypatch.setitem(tasks.TASKS, HEADLINE, quick)
    monkeypatch.setattr(runs, "battery", lambda key, split: Battery(few, few, {"text": few}, few))
    runs._of_base.cache_clear()
    sft = replace(cells.cells("SFT")[0], experiment="headline", task=HEADLINE)
    found = runs.figures(sft)
    assert [point["scale"] for point in found["points"]] == list(cells.SCALES)
    start = runs.figures(cells.base(HEADLINE, "test"))["points"][0]
    moved = [abs(point["domain"]["loss"] - start["domain"]["loss"]) for point in found["points"]]
    assert 0 < moved[0] < moved[-1]
    assert start["kl"] == pytest.approx(0, abs=1e-6)
    assert 0 < found["points"][0]["kl"] < found["points"][-1]["kl"]
    assert 0 < found["cosine"] < 1
    runs._of_base.cache_clear()


def test_pages_have_what_was_measured() -> None:
    rows = store.rows(cells.RESULTS)
    for file in page.PAGES.values():
        text = file.read_text(encoding="utf-8")
        assert "<!-- study: " in text
        assert page.filled(text, rows) == text
    assert {answer.number for answer in answers(rows)} >= {"1", "2", "3", "4", "6"}


def test_another_row_changes_the_page() -> None:
    text = page.PAGES["docs/study-data.md"].read_text(encoding="utf-8")
    rows = store.rows(cells.RESULTS)
    last = next(r for r in rows if r["experiment"] == "headline" and r["label"] == "LfU LoRA")
    moved = {**last, "points": [{**p, "domain": {**p["domain"], "loss": 9.0}} for p in last["points"]]}
    assert page.filled(text, [moved if r is last else r for r in rows]) != text
