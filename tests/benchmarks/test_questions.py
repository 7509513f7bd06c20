"""The experiments of the open questions: their size, that every variant trains, and the text without answers."""

from __future__ import annotations

import functools
import itertools
import json
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from evidence import report, run
from evidence.experiments import EXPERIMENTS
from evidence.finetune import Spec, base_of, finetuned
from evidence.grids import ENTRIES
from evidence.tasks import TASKS
from evidence.unlabelled import KINDS, batches
from torch import nn

QUESTIONS = ("questions", "remedies", "long")
OPTIONS = ("ascent_from", "mask", "consistency_on", "ratio", "anneal")
TUNED: list[dict[str, Any]] = [
    {**asdict(replace(entry.cells()[0], experiment=name, task="subtract-128", seed=100)), "score": 0.5}
    for name in ("tune-skills", "tune-text")
    for entry in ENTRIES.values()
]
VARIANTS = {
    f"{spec.experiment}: {spec.label}": spec
    for name in QUESTIONS
    for spec in EXPERIMENTS[name](TUNED)
    if spec.seed == 0 and "noisy" not in spec.task
}


@functools.cache
def reference(spec: Spec) -> nn.Module:
    """Fine-tuned in two steps, as `test_every_variant_trains` has set."""
    return finetuned(spec)[0]


def test_they_are_few() -> None:
    specs = {name: EXPERIMENTS[name](TUNED) for name in QUESTIONS}
    assert len(specs["questions"]) + len(specs["remedies"]) <= 140
    assert len(specs["long"]) <= 40
    everything = [spec.key() for name in EXPERIMENTS for spec in EXPERIMENTS[name](TUNED)]
    assert len(everything) == len(set(everything))


def test_long_runs_are_made_at_the_learning_rate_of_sft() -> None:
    rows = [{**row, "lr": 0.0123} if row["label"] == "SFT" else row for row in TUNED]
    assert {spec.lr for spec in EXPERIMENTS["long"](rows)} == {0.0123}


@pytest.mark.parametrize("name", list(VARIANTS))
def test_every_variant_trains(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = VARIANTS[name]
    monkeypatch.setitem(TASKS, spec.task, replace(TASKS["subtract-16"], steps=2))
    model, figures = finetuned(spec)
    assert 0 < figures["train_nll"] < 10
    settings = json.loads(spec.settings)
    fewer = {key: value for key, value in settings.items() if key not in OPTIONS}
    without = replace(spec, settings=json.dumps(fewer)) if fewer != settings else Spec("", spec.task, "sft", "SFT")
    pairs = zip(
        model.parameters(), reference(replace(without, lr=spec.lr, label="", experiment="")).parameters(), strict=True
    )
    assert any(not torch.equal(one, two) for one, two in pairs) or spec.method == "sft"
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("kind", list(KINDS))
def test_text_without_answers(kind: str) -> None:
    _, tokenizer = base_of("skills")
    first, again, other = (list(itertools.islice(batches(kind, "skills", tokenizer, 8, s), 4)) for s in (1, 1, 2))
    assert all(set(batch) == {"input_ids", "attention_mask"} for batch in first)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, again, strict=True))
    assert first[0]["input_ids"].tolist() != other[0]["input_ids"].tolist()
    texts = [t for batch in first for t in tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)]
    assert len(set(texts)) == 32
    if kind == "old prompts":
        assert not any("minus" in text or "-" in text or "take" in text for text in texts)
        assert all(text.endswith(("=", ": ", " is ", ":", " is")) for text in texts)


def test_runs_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 13.5])
    monkeypatch.setattr(run.time, "process_time", lambda: next(clock))
    monkeypatch.setitem(run.MEASURES, "quick", lambda spec: {"score": 0.5})
    spec = Spec("quick", "subtract-16", "sft", "SFT")
    assert run._work((spec, "abc")) == (spec, "abc", {"score": 0.5, "seconds": 3.5})


def test_the_page_has_the_questions_and_sums_the_time() -> None:
    figures = {"in_domain": 0.5, "variation_mean": 0.5, "variation_spread": 0.1, "retention": 0.9, "train_seconds": 1.0}
    data = [
        {**asdict(spec), **figures, "score": 0.5 + 0.01 * spec.seed, "commit": "abc", "date": "2026-01-01"}
        for spec in (*VARIANTS.values(), *(replace(s, seed=1) for s in VARIANTS.values()))
    ]
    text = report.page(data)
    assert "core-hours" not in text
    for title in ("## Questions", "## Remedies", "## Few examples, many steps"):
        assert title in text
    assert all(f"| {spec.label} |" in text for spec in VARIANTS.values())
    data[0]["seconds"], data[3]["seconds"] = 7200.0, 3600.0
    assert "The 2 runs that were timed took 3.0 core-hours." in report.page(data)
    json.dumps(data)
