"""The runs behind docs/choosing-a-strength.md: each measures what it says, and the page has what they found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from demo.train import Recipe
from strength import directions, page, price, ratio, rounding, sizes, store, training

from lfu_reg.cli.methods import make_method
from lfu_reg.cli.workloads import Setting, make_workload

pytestmark = pytest.mark.filterwarnings("ignore::lfu_reg.LfUWarning")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fine-tuning of the smallest model for three steps, examined on a few examples."""
    small = replace(sizes.SIZES["0.8M"], recipe=Recipe(3, 2, 2e-3, "lora", 48), domain=4)
    monkeypatch.setitem(sizes.SIZES, "0.8M", small)


def test_the_measured_ratio_is_the_strength(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ratio, "STEPS", 2)
    found = ratio.measured(ratio.Cell("0.8M", "steering", "float32", "mean", 1, "lora"))
    assert found["low"] == pytest.approx(1, abs=0.05)
    assert found["high"] == pytest.approx(1, abs=0.05)
    assert found["metric"] == pytest.approx(1, abs=0.05)
    assert len({*ratio.cells("0.8M")}) == 24


def test_a_step_is_the_consistency_term_alone(quick: None) -> None:
    model, batches = rounding.tuned("0.8M")
    alpha, found = rounding.alpha_for(model, batches[0], "steering", 1e-2, 1.0)
    assert found.moved == pytest.approx(1e-2, rel=0.03)
    again = rounding.Step(model, batches[0], "steering", alpha)
    assert rounding.cosine(found.gradient, again.gradient) == pytest.approx(1, abs=1e-4)
    coarse = rounding.Step(model, batches[0], "steering", alpha / 100, autocast=True)
    assert rounding.cosine(found.gradient, coarse.gradient) < 0.9


@pytest.mark.parametrize("setting", ["strength", "one-backward", "perturbed", "lam at alpha 0.1"])
def test_one_run(quick: None, setting: str) -> None:
    found = training.figures(training.Run("0.8M", "subtract-128", "steering", setting, 1.0, 0))
    assert found["rise"] == pytest.approx(found["kept"] - training.base("0.8M", "subtract-128")[1])
    assert found["lam"] > 0
    if setting == "strength":
        assert found["gradient_ratio"] == pytest.approx(1, abs=0.01)


def test_plans_do_not_repeat_themselves() -> None:
    runs = list(training.transfer(["0.8M", "2.2M"], 2))
    assert len(runs) == len(set(runs)) == 2 * 2 * (4 + 15)
    scores = list(training.scores(["2.2M"], 5))
    assert {run for run in scores if run.task == "gsm8k-64" and run.setting == "strength" and run.seed < 2} <= set(runs)


def test_the_direction_of_the_batch_itself_is_exact(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directions, "MODEL", "0.8M")
    found = directions.cosines("steering", 8, 4)
    assert {len(values) for values in found.values()} == {1}
    assert min(found["exact, through the clean pass"]) > 0.99


def test_methods_that_are_timed() -> None:
    workload = make_workload(Setting("tiny", "lora", batch=2, tokens=8))
    methods = [make_method(key, workload) for key in price.METHODS]
    assert [m.key for m in methods] == ["sft", "steering", "lora", "weights", "steering-one", "lora-one", "weights-one"]
    for method in methods:
        method.run()


def test_rows_are_appended_and_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "RESULTS", tmp_path)
    store.append("x", {"size": "0.8M", "value": 1 / 3})
    store.append("x", {"size": "2.2M", "value": 2.0})
    assert store.rows("x")[0] == {"size": "0.8M", "value": "0.3333"}
    assert store.has(store.rows("x"), size="2.2M")
    assert not store.has(store.rows("x"), size="135M")


def test_the_page_has_the_measured_tables() -> None:
    text = page.PAGE.read_text()
    assert page.with_tables(text) == text
    with pytest.raises(ValueError, match="no single place for the table"):
        page.with_tables(text.replace("<!-- price -->", ""))


def test_the_best_strength_is_the_one_with_the_lowest_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    task = sizes.SIZES["2.2M"].task
    base = {"size": "2.2M", "task": task, "rise": "0.1", "lam": "5", "product": "0.5", "seed": "0"}
    rows = [
        {**base, "auxiliary": "", "setting": "lr", "value": "0.002", "domain": "3.0"},
        {**base, "auxiliary": "lora", "setting": "strength", "value": "1", "domain": "2.5"},
        {**base, "auxiliary": "lora", "setting": "strength", "value": "3", "domain": "2.7"},
        {**base, "auxiliary": "lora", "setting": "strength", "value": "10", "domain": "2.9"},
    ]
    monkeypatch.setattr(store, "rows", lambda name: rows)
    assert "| 2.2M | gsm8k-64 | lora | 3.100 |  |  | **2.600** | 2.800 | 3.000 | 5 | 0.5 | 1 |" in page.strengths()
