"""The evidence made again: what is repeated, when it agrees, what flips, and that interrupted runs go on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from evidence import corpus, run, store
from evidence.again.__main__ import main
from evidence.again.agreement import Repeated, compared
from evidence.again.duration import processor_seconds
from evidence.again.plan import asked, left_out, obstacle, planned
from evidence.finetune import BASES, Spec
from evidence.paired import difference
from evidence.tasks import TASKS
from evidence.verdicts import claims
from scipy import stats

from tests.benchmarks.one_process import in_one_process

Rows = list[dict[str, Any]]
LABELS = ("SFT", "NEFTune", "LfU LoRA", "LfU steering", "SAM")
B = next(c for c in claims() if (c.hypothesis, c.better, c.worse) == ("b", "LfU LoRA", "SFT"))


def spec(label: str, seed: int, **more: Any) -> Spec:
    lfu = label.startswith("LfU")
    settings = json.dumps({"flavour": label.split()[1].lower(), "alpha": 0.1, "lam": 0.5}) if lfu else "{}"
    return replace(Spec("compare-skills", "subtract-128", "lfu" if lfu else "sft", label, settings, seed=seed), **more)


def row(of: Spec, **figures: float) -> dict[str, Any]:
    known = {"score": 0.5, "in_domain": 0.5, "variation_spread": 0.1, "retention": 0.9, "train_seconds": 2.0}
    return {**asdict(of), **known, "commit": "abc", "date": "2026-01-01", **figures}


def retained(ours: list[float], first: int = 0) -> Rows:
    """SFT keeps 0.5 whatever the seed, LfU LoRA what is given."""
    return [
        row(spec(label, first + i), retention=value if label == "LfU LoRA" else 0.5)
        for label in ("SFT", "LfU LoRA")
        for i, value in enumerate(ours)
    ]


def repeated(old: list[float], new: list[float]) -> Repeated:
    (found,) = compared(retained(old), retained(new, 5), [B])
    return found


OLD = [0.61, 0.63, 0.58, 0.66, 0.60]


@pytest.mark.parametrize("new", [[0.60, 0.65, 0.62], [0.70, 0.71, 0.72], [0.64, 0.69, 0.67], [0.2, 0.9, 0.7]])
def test_agreement_is_welchs_test(new: list[float]) -> None:
    found = repeated(OLD, new)
    reference = stats.ttest_ind(OLD, new, equal_var=False)
    assert found.agrees == (reference.pvalue >= 0.05)
    low, high = reference.confidence_interval()
    assert found.allowed == pytest.approx((high - low) / 2, rel=1e-6)


def test_both_sides_of_the_bound() -> None:
    assert repeated(OLD, [0.60, 0.65, 0.62]).agrees
    assert not repeated(OLD, [0.70, 0.71, 0.72]).agrees
    assert not repeated(OLD, [0.70, 0.71, 0.72]).flips


@pytest.mark.parametrize(("new", "agrees"), [(0.69, True), (0.72, False)])
def test_one_seed_is_judged_by_the_published_spread(new: float, agrees: bool) -> None:
    found = repeated(OLD, [new])
    width = stats.t.ppf(0.975, 4) * stats.tstd(OLD) * (1 + 1 / 5) ** 0.5
    assert found.allowed == pytest.approx(width)
    assert found.agrees is agrees
    assert found.verdicts == ("supported", "one seed")


def test_one_seed_alone_does_not_flip() -> None:
    assert not repeated(OLD, [0.1]).flips
    assert not repeated(OLD, [0.1]).agrees


@pytest.mark.parametrize("turned", [False, True])
def test_a_flip(turned: bool) -> None:
    lower = [0.41, 0.40, 0.42]
    found = repeated(OLD, lower) if not turned else repeated([*lower, 0.39, 0.40], OLD[:3])
    assert set(found.verdicts) == {"supported", "contradicted"}
    assert found.flips
    assert not found.agrees


def test_becoming_open_is_no_flip() -> None:
    found = repeated(OLD, [0.4, 0.7, 0.65])
    assert found.verdicts == ("supported", "open")
    assert not found.flips
    assert found.agrees


def test_figures_without_spread_agree_up_to_rounding() -> None:
    assert repeated([0.5] * 5, [0.5] * 3).agrees
    assert repeated([0.5] * 5, [0.50001] * 3).agrees
    assert not repeated([0.5] * 5, [0.501] * 3).agrees


def test_a_single_pair_is_not_significant() -> None:
    found = difference([1.0], [0.5])
    assert B.verdict(found) == "open"


def published() -> Rows:
    """Five seeds of a comparison and of noise; SAM's learning rate differs from the others'."""
    rows = [
        row(spec(label, s, lr=1e-3 if label == "SAM" else 4e-3), retention=0.5 + 0.1 * i + 0.01 * s * i)
        for i, label in enumerate(LABELS)
        for s in range(5)
    ]
    for i, label in enumerate(LABELS[:4]):
        rows += [row(spec(label, s, experiment="noise"), cosine=0.8 + 0.01 * i + 0.001 * s * i) for s in range(5)]
    return rows


def test_the_plan_repeats_published_cells_with_fresh_seeds() -> None:
    listed = asked("abcdef", [])
    specs = planned(published(), listed, ["compare-skills", "noise"], [5, 6, 7])
    assert {(s.experiment, s.label) for s in specs} == {
        *(("compare-skills", label) for label in ("SFT", "NEFTune", "LfU LoRA", "LfU steering")),
        *(("noise", label) for label in ("SFT", "LfU LoRA", "LfU steering")),
    }
    assert len(specs) == len(set(specs)) == 7 * 3
    cells = {replace(store.spec_of(r), seed=0) for r in published()}
    assert {replace(s, seed=0) for s in specs} <= cells
    assert {s.seed for s in specs} == {5, 6, 7}


def test_further_methods_are_compared_with_sft() -> None:
    specs = planned(published(), asked("d", ["SAM"]), ["compare-skills", "noise"], [5])
    assert [(s.label, s.lr) for s in specs if s.experiment == "compare-skills"] == [("SAM", 1e-3), ("SFT", 4e-3)]


def test_what_is_not_published_is_told() -> None:
    rows = [r for r in published() if r["experiment"] != "noise"]
    told = left_out(rows, asked("abcdef", []), ["compare-skills", "compare-text", "noise"])
    assert told[1:] == ["compare-text: not published yet", "noise: not published yet"]
    assert told[0].startswith("compare-skills: without LfU LoRA, random direction, ")
    assert left_out(rows, asked("b", []), ["compare-skills", "noise"]) == []


def test_what_cannot_be_run_here_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row(spec("SFT", 0, experiment="compare-text", task="gsm8k-64"))]
    monkeypatch.setitem(BASES, "text", tmp_path)
    monkeypatch.setattr(corpus, "DATA", tmp_path / "none")
    assert "Set LFU_DATA" in str(obstacle("compare-text", rows))
    monkeypatch.setattr(corpus, "DATA", tmp_path)
    assert obstacle("compare-text", rows) is None
    monkeypatch.setitem(BASES, "text", tmp_path / "none")
    assert "base model" in str(obstacle("compare-text", rows))
    assert obstacle("compare-skills", published()) is None


def test_the_expected_time() -> None:
    timed = [row(spec("SFT", s), seconds=4.0 + s, train_seconds=3.0) for s in range(3)]
    old = [row(spec("NEFTune", s), train_seconds=6.0) for s in range(2)]
    untimed = {k: v for k, v in row(spec("SAM", 0)).items() if k != "train_seconds"}
    rows = [*timed, *old, untimed]
    assert processor_seconds([spec("SFT", 5), spec("SFT", 6)], rows) == pytest.approx(10.0)
    assert processor_seconds([spec("NEFTune", 5)], rows) == pytest.approx(6.0 + 2.0)  # measuring took 1, 2, 3
    assert processor_seconds([spec("SAM", 5)], rows) == pytest.approx((4 + 5 + 6 + 8 + 8) / 5)
    assert math.isnan(processor_seconds([spec("SAM", 5)], [untimed]))


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    path = tmp_path / "published.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in published()))
    return ["--published", str(path), "--out", str(tmp_path / "cache" / "again.jsonl")]


Runs = list[list[Spec]]


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], Runs]:
    """Runs that take no time: retention is that of the published rows, or turned around one half."""

    def install(sign: float) -> Runs:
        started: Runs = []

        def carry_out(todo: list[Spec], workers: int, title: str, path: Path) -> None:
            started.append(todo)
            for s in todo:
                i = LABELS.index(s.label)
                kept = 0.5 + sign * (0.1 * i + 0.01 * (s.seed - 4) * i)
                figures = {k: v for k, v in row(s).items() if isinstance(v, float) and k != "lr" and k != "dropout"}
                store.append(s, {**figures, "retention": kept, "cosine": 0.8 + 0.01 * i}, "def", path)

        monkeypatch.setattr(run, "carry_out", carry_out)
        return started

    return install


def test_the_command_agrees_and_goes_on(
    files: list[str], pretended: Callable[[float], Runs], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started = pretended(1.0)
    before = Path(files[1]).read_bytes()
    report = tmp_path / "report.json"
    assert main([*files, "--seeds", "5", "6", "--hypotheses", "b"]) == 0
    out = capsys.readouterr().out
    assert "8 runs to go: about 0.1 minutes" in out
    assert "4 of 4 comparisons agree" in out
    assert main([*files, "--hypotheses", "b", "--json", str(report)]) == 0
    assert [[s.seed for s in todo] for todo in started] == [[5] * 4 + [6] * 4, [7] * 4]
    assert main([*files, "--hypotheses", "b"]) == 0
    assert len(started) == 2
    assert Path(files[1]).read_bytes() == before

    read = json.loads(report.read_text())
    assert (read["agree"], read["flip"], read["seeds"], read["commits"]) == (4, 0, [5, 6, 7], ["def"])
    (one,) = (c for c in read["comparisons"] if (c["better"], c["worse"]) == ("LfU LoRA", "SFT"))
    assert one["published"]["mean"] == pytest.approx(0.24)
    assert (one["published"]["seeds"], one["again"]["seeds"]) == (5, 3)
    assert (one["again"]["verdict"], one["agrees"]) == ("supported", True)


def test_rows_of_other_hyperparameters_are_not_used(
    files: list[str], pretended: Callable[[float], Runs], capsys: pytest.CaptureFixture[str]
) -> None:
    pretended(1.0)
    assert main([*files, "--hypotheses", "b"]) == 0
    before = capsys.readouterr().out.splitlines()[-12:]
    for seed in (5, 6, 7):
        store.append(spec("LfU LoRA", seed, lr=9.0), {"retention": 0.0}, "old", Path(files[3]))
    assert main([*files, "--hypotheses", "b"]) == 0
    assert capsys.readouterr().out.splitlines()[-12:] == before


def test_a_flip_is_the_exit_code(
    files: list[str], pretended: Callable[[float], Runs], capsys: pytest.CaptureFixture[str]
) -> None:
    pretended(-1.0)
    assert main([*files, "--hypotheses", "b"]) == 1
    assert "0 of 4 comparisons agree, 4 flip" in capsys.readouterr().out


def test_a_dry_run_runs_nothing(
    files: list[str], pretended: Callable[[float], Runs], capsys: pytest.CaptureFixture[str]
) -> None:
    started = pretended(1.0)
    assert main([*files, "--full", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "21 runs to go" in out
    assert "compare-text: not published yet" in out
    assert "compare-full: not published yet" in out
    assert not started
    assert not Path(files[3]).exists()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--seeds", "4", "5"], "seeds [4] are published"),
        (["--methods", "SAN"], "no published comparison has ['SAN']; there are LfU LoRA"),
        (["--hypotheses", "f"], "nothing to repeat"),
    ],
)
def test_bad_input(
    files: list[str],
    given: list[str],
    told: str,
    pretended: Callable[[float], Runs],
    capsys: pytest.CaptureFixture[str],
) -> None:
    pretended(1.0)
    with pytest.raises(SystemExit) as stop:
        main([*files, *given])
    assert stop.value.code == 2
    assert told in " ".join(capsys.readouterr().err.split())


def test_the_published_rows_are_not_written_to(
    files: list[str], pretended: Callable[[float], Runs], capsys: pytest.CaptureFixture[str]
) -> None:
    pretended(1.0)
    with pytest.raises(SystemExit):
        main([*files[:2], "--out", files[1]])
    assert "give another file" in capsys.readouterr().err


def test_real_runs(files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    in_one_process(monkeypatch)  # so that the shortened task is seen
    monkeypatch.setitem(TASKS, "subtract-128", replace(TASKS["subtract-128"], steps=2))
    assert main([*files, "--hypotheses", "d", "--seeds", "5"]) == 0
    rows = store.rows(Path(files[3]))
    assert [(r["label"], r["seed"], r["experiment"]) for r in rows] == [
        (label, 5, "noise") for label in ("LfU LoRA", "SFT", "LfU steering")
    ]
    assert all({"cosine", "cosine/0", "seconds", "commit"} <= set(r) for r in rows)
    again = run.MEASURES["noise"](store.spec_of(rows[0]))
    assert rows[0]["cosine"] == pytest.approx(again["cosine"], rel=1e-4)
