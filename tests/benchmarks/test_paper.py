"""The paper's numbers, the tables as they are declared, and the page that sets measured beside published ones."""

from __future__ import annotations

import csv
import statistics
from pathlib import Path
from typing import Any

import pytest
from evidence.corpus import DATA
from paper import local_tasks, needs, store
from paper.published import ATTACKS, CATEGORIES, FILE, mean_ranks, published
from paper.report import cell, page, reduced
from paper.settings import MODELS, PROTOCOLS, Model, Protocol, switched
from paper.tables import LFU, SFT, TABLES, VANILLA, Row, with_sft_grid
from paper.tasks import ELEVEN, HARNESS, SIZES, by_category, checked, main_figure
from paper.train import settings_of

ROOT = Path(__file__).resolve().parents[2]
SMALL = str(ROOT / "benchmarks" / "demo" / "model")
MAIN_MODELS = ("Llama-3.1-8B", "Llama-3.1-8B-Instruct", "Llama-2-7B", "Mistral-7B-v0.3")
LLAMA = "Llama-3.1-8B"


@pytest.mark.skipif(not (DATA.parent / "paper").exists(), reason="the numbers are not there a second time")
def test_published_numbers_are_the_paper_s_cell_by_cell() -> None:
    def cells(row: dict[str, str], leaving_out: tuple[str, ...] = ()) -> dict[str, str]:
        return {name: value for name, value in row.items() if value and name not in leaving_out}

    def read(file: Path) -> list[dict[str, str]]:
        with file.open(newline="", encoding="utf-8") as lines:
            return list(csv.DictReader(lines))

    ours, theirs = read(FILE), DATA.parent / "paper"
    fourth = [cells(row, ("table", "model", "data")) for row in ours if row["table"] == "4"]
    assert fourth == [cells(row) for row in read(theirs / "table4_asr.csv")]
    assert [cells(row) for row in ours if row["table"] != "4"] == [cells(row) for row in read(theirs / "tables.csv")]


def test_published_numbers_give_what_the_text_says() -> None:
    known = published()
    dolly = known["2", LLAMA, "Alpagasus Dolly 3k"]
    assert 100 * (dolly["LfU", ""]["math"] / dolly["SFT", ""]["math"] - 1) == pytest.approx(16.8, abs=0.05)
    attacks = known["4", LLAMA, "BeaverTails"]
    assert attacks["SFT", ""]["purebad_5"] - attacks["LfU", ""]["purebad_5"] == pytest.approx(45.0)
    # Tables 1 and 2 with 136 cells each, then 3, 4, 5a, 5b and 6.
    assert sum(len(figures) for rows in known.values() for figures in rows.values()) == 272 + 18 + 36 + 32 + 12 + 24


@pytest.mark.parametrize("table", ["1", "2"])
@pytest.mark.parametrize("model", MAIN_MODELS)
def test_published_ranks_are_mean_ranks_over_categories(table: str, model: str) -> None:
    rows = published()[table, model, "GSM8K" if table == "1" else "Alpagasus Dolly 3k"]
    told = {method: figures["rank"] for (method, _), figures in rows.items() if method != "Vanilla"}
    ranks = mean_ranks({method: {c: rows[method, ""][c] for c in CATEGORIES} for method in told})
    # The paper ranked scores with more digits than it printed, which parts some that are equal here.
    assert all(abs(ranks[method] - told[method]) <= 0.55 for method in told)
    assert statistics.median(abs(ranks[method] - told[method]) for method in told) <= 0.26


@pytest.mark.parametrize("key", [key for key in TABLES if not key.startswith("figure")])
def test_every_published_row_is_declared_once_and_no_other(key: str) -> None:
    rows = [(row.label, row.setting) for row in TABLES[key].rows]
    told = [list(rows) for (table, _, _), rows in published().items() if table == key]
    assert told
    assert all(sorted(rows) == sorted(listed) for listed in told)


def test_alpha_and_lambda_are_the_paper_s() -> None:
    base, instruct, steering = MODELS["llama-3.1-8b"], MODELS["llama-3.1-8b-instruct"], Row("", "lfu-steering")
    assert settings_of(LFU, base) == {"alpha": 0.1, "lam": 5.0}
    assert settings_of(LFU, instruct) == {"alpha": 0.001, "lam": 500.0}
    assert settings_of(steering, base) == settings_of(steering, instruct) == {"alpha": 0.1, "lam": 0.1}
    told = {row.setting: settings_of(row, instruct) for row in TABLES["5a"].rows if row.method == "lfu"}
    for setting, settings in told.items():
        assert f"lam={settings['lam']:g} alpha={settings['alpha']:g}" in setting
    assert len(told) == 7


def test_the_two_readings() -> None:
    code, text = PROTOCOLS["published"], PROTOCOLS["text"]
    assert code == Protocol()
    different = {name for name in code.__dict__ if code.__dict__[name] != text.__dict__[name]}
    assert different == {"name", "checkpointing", "direction", "states", "lora", "steering"}


def test_switches() -> None:
    changed = switched(Protocol(), ["clip=0", "keep_last=false", "states=blocks"])
    assert (changed.clip, changed.keep_last, changed.states) == (0.0, False, "blocks")
    assert changed.name == "published, clip=0, keep_last=false, states=blocks"
    for switch, message in [("clap=1", "there are lr"), ("clip=much", "number"), ("states=all", "hidden-states, bl"),
                            ("keep_last=0", "true, false")]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            switched(Protocol(), [switch])


def test_sft_at_three_rates_and_three_seeds() -> None:
    rows = [row for row in with_sft_grid(TABLES["1"]).rows if row.method == "sft"]
    told = [(row.protocol(Protocol()).lr, row.protocol(Protocol()).seed) for row in rows]
    assert sorted(told) == sorted((lr, seed) for lr in (5e-5, 1e-4, 2e-4) for seed in (42, 43, 44))
    assert with_sft_grid(TABLES["5b"]) == TABLES["5b"]


# ---------------------------------------------------------------------- tasks


def test_eleven_tasks_in_four_categories() -> None:
    assert len(ELEVEN) == len(set(ELEVEN)) == 11 == len(HARNESS) == len(SIZES)
    assert by_category({"gsm8k": 10.0, "asdiv": 30.0, "coqa": 50.0}) == {"math": 20.0, "reasoning": 50.0}
    assert main_figure({"acc,none": 0.25, "acc_norm,none": 0.5}) == 50.0
    assert main_figure({"exact_match,strict-match": 0.0, "exact_match,flexible-extract": 0.5}) == 50.0
    with pytest.raises(ValueError, match="unknown tasks lambda; there are gsm8k"):
        checked(["lambda"])
    with pytest.raises(KeyError, match="none of the figures"):
        main_figure({"perplexity,none": 3.0})


def harness_file(name: str) -> dict[str, Any]:
    """The harness's own declaration of a task, its functions left out."""
    lm_eval = pytest.importorskip("lm_eval")
    yaml = pytest.importorskip("yaml")

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: None)
    folder = Path(lm_eval.__file__).parent / "tasks"
    for top in ("gsm8k", "mathqa", "asdiv", "mmlu/default", "piqa", "hellaswag", "lambada", "arc", "coqa", "toxigen",
                "truthfulqa"):  # fmt: skip
        for file in (folder / top).glob("*yaml"):
            config = yaml.load(file.read_text(encoding="utf-8"), Loader)
            if name in (config.get("task"), config.get("group")):
                parent = folder / top / config.get("include", file.name)
                return {**yaml.load(parent.read_text(encoding="utf-8"), Loader), **config}
    raise LookupError(name)


@pytest.mark.parametrize("name", [part for parts in HARNESS.values() for part in parts])
def test_the_harness_has_the_tasks(name: str) -> None:
    assert harness_file(name)


@pytest.mark.parametrize("name", ["gsm8k", "piqa", "hellaswag", "arc_easy", "arc_challenge", "toxigen"])
def test_local_prompts_are_the_harness_s(name: str) -> None:
    theirs, ours = harness_file(name), local_tasks.TASKS[name]
    assert ours["doc_to_text"] == theirs["doc_to_text"]
    assert ours["output_type"] == theirs["output_type"]
    if "doc_to_choice" in theirs:
        assert ours["doc_to_choice"] == theirs["doc_to_choice"]


def test_local_prompt_of_truthfulqa_is_the_harness_s() -> None:
    jinja2 = pytest.importorskip("jinja2")
    texts = [harness_file("truthfulqa_mc2")["doc_to_text"], local_tasks.TASKS["truthfulqa_mc2"]["doc_to_text"]]
    theirs, ours = (jinja2.Template(text).render(question="Why?").strip() for text in texts)
    assert ours == theirs


def test_the_space_that_ends_mathqa_s_local_questions_is_left_out() -> None:
    jinja2 = pytest.importorskip("jinja2")
    text = jinja2.Template(local_tasks.TASKS["mathqa"]["doc_to_text"]).render(query="Which?\nAnswer: ")
    assert text == "Which?\nAnswer:"  # the harness puts a space of its own before the answers


def test_truthfulqa_counts_the_probability_of_right_answers() -> None:
    score = local_tasks.TASKS["truthfulqa_mc2"]["process_results"]
    doc = {"mc2_targets": {"labels": [1, 0, 1]}}
    assert score(doc, [(0.0, False), (0.0, True), (0.0, False)])["acc"] == pytest.approx(2 / 3)


def test_coqa_and_toxigen_as_the_harness_has_them() -> None:
    coqa = local_tasks.TASKS["coqa"]
    doc: dict[str, Any] = {
        "story": "S.",
        "questions": {"input_text": ["q1", "q2"]},
        "answers": {"input_text": ["a1", "the red hat"]},
    }
    assert coqa["doc_to_text"](doc) == "S.\n\nQ: q1\n\nA: a1\n\nQ: q2\n\nA:"
    assert coqa["process_results"](doc, ["Red hat.\nQ:"])["f1"] == 1.0
    assert coqa["process_results"](doc, ["red coat"])["f1"] == 0.5
    assert coqa["process_results"](doc, ["blue"])["f1"] == 0.0
    doc["additional_answers"] = {"0": {"input_text": ["a1", "a coat"]}, "1": {"input_text": ["a1", "The red hat"]}}
    assert sorted(coqa["doc_to_target"](doc)) == ["a coat", "the red hat"]
    assert coqa["process_results"](doc, ["red hat"])["f1"] == 0.5  # each answer left out once
    toxic = local_tasks.TASKS["toxigen"]["doc_to_target"]
    assert [toxic({"toxicity_ai": a, "toxicity_human": 3.0}) for a in (2.5, 2.6)] == [0, 1]


# ---------------------------------------------------------------------- needs, records, page


def test_needs_of_a_known_model() -> None:
    def needed(*rows: Row, **changes: Any) -> needs.Needs:
        call = {"examples": 160, "tokens": 50, "longest": 100, "processes": 1, "flops": 1e12, **changes}
        return needs.needs_of(SMALL, list(rows), call.pop("protocol", Protocol()), **call)

    said = needed(SFT)
    assert said.parameters == pytest.approx(0.87e6, rel=0.02)
    assert said.training == pytest.approx(6 * said.parameters * 50 * 160 * 3 / 1e12)
    plain = needed(SFT, protocol=Protocol(checkpointing="off"))
    assert plain.training == pytest.approx(4 * said.parameters * 50 * 160 * 3 / 1e12)
    assert plain.memory > said.memory
    assert needed(SFT, LFU).training == pytest.approx(4 * said.training)  # 1 + 3 with a second loader
    assert needed(SFT, VANILLA).training == said.training
    assert needed(SFT, VANILLA).evaluation == pytest.approx(2 * said.evaluation)
    assert needed(SFT, steps=1).training == pytest.approx(said.training * 16 / 480)
    assert needed(SFT, limit=10, tasks=["asdiv"]).evaluation == pytest.approx(2 * said.parameters * 600 / 1e12)
    assert needed(SFT, tasks=[]).evaluation == 0
    assert said.memory - needed(SFT, processes=2).memory == said.parameters
    assert "h of evaluation" in str(said)
    assert "time unknown" in str(needed(SFT, flops=None))


def test_a_step_s_price_depends_on_the_reading() -> None:
    code, text = PROTOCOLS["published"], PROTOCOLS["text"]
    steering = Row("LfU RepS", "lfu-steering")
    assert [needs.training_steps_of_sft(row, p) for p in (code, text) for row in (SFT, LFU, steering)] == [
        *(1.0, 3.0, 2.0),
        *(1.0, 2.0, 2.0),
    ]


def test_finished_runs_are_found_again(tmp_path: Path) -> None:
    file = tmp_path / "new" / "rows.jsonl"
    assert store.records(file) == []
    run = {"method": "sft", "settings": {"alpha": 0.123456789}, "names": ["piqa"]}
    store.append(file, {"run": run, "scores": {"piqa": 51.23456789}})
    (record,) = store.records(file)
    assert record["scores"] == {"piqa": 51.235}
    assert store.find([record], run) == record
    assert store.find([record], {**run, "names": ["asdiv"]}) is None


def test_cells() -> None:
    assert cell(52.04, 51.5) == "52.0 / 51.5 (+0.5)"
    assert cell(None, 51.5) == "n/a / 51.5"
    assert cell(52.04, None) == "52.0"
    assert cell(0.9876, None) == "0.988"


def test_a_page_sets_measured_beside_published() -> None:
    measured = [
        (VANILLA, {"math": 38.0}),
        (SFT, {"math": 50.5, "knowledge": 70.0}),
        (LFU, {"math": 54.2, "knowledge": 71.0}),
    ]
    said = page("1", TABLES["1"], MODELS["llama-3.1-8b"], "gsm8k", measured)
    assert "## Table 1: Fine-tuning on one task, Llama-3.1-8B on GSM8K" in said
    assert "| SFT |  | 50.5 / 51.5 (-1.0) | 70.0 / 73.3 (-3.3) | n/a / 65.1 | n/a / 44.1 | 2.0 / 4.8 (-2.8) |" in said
    assert "| LfU |  | 54.2 / 54.2 (+0.0) |" in said
    assert "another model" not in said
    assert "another model" in page("1", TABLES["1"], Model("", "mine"), "gsm8k", measured)
    assert "no numbers for this" in page("1", TABLES["1"], MODELS["qwen3-4b"], "arc_challenge", measured)


def test_a_page_tells_sft_s_spread_and_figure_5() -> None:
    again = [row for row in with_sft_grid(TABLES["1"]).rows if row.method == "sft"]
    said = page("1", TABLES["1"], MODELS["llama-3.1-8b"], "gsm8k", [(r, {"math": 50.0 + r.seed_shift}) for r in again])
    assert "Standard deviation of SFT over 3 seeds: math 1.00." in said
    variations = [(SFT, {"mean": 50.0, "sd": 10.0}), (LFU, {"mean": 51.0, "sd": 1.0})]
    said = page("figure5", TABLES["figure5"], MODELS["llama-3.1-8b"], "gsm8k", variations)
    assert "-90.0 / -92.1 (+2.1) percent" in said
    assert "no numbers for this" not in said
    said = page("figure5", TABLES["figure5"], MODELS["llama-3.1-8b"], "gsm8k", [(SFT, {"sd": 0.0}), (LFU, {"sd": 0.0})])
    assert "n/a / -92.1 percent" in said


def test_a_page_of_reduced_size_says_so() -> None:
    whole = {"limit": None, "examples": None, "steps": None, "only_tasks": None, "tasks": "hub"}
    assert reduced(whole) == []
    changes = {"limit": 2, "examples": 3, "steps": 4, "only_tasks": ["piqa"], "tasks": "local"}
    for option, value in changes.items():
        (said,) = reduced({**whole, option: value})
        assert option.replace("_", "-") in said
        assert "Reduced size" in said


@pytest.mark.parametrize("key", TABLES)
def test_every_table_has_a_page_with_all_rows(key: str) -> None:
    rows = [(row, dict.fromkeys((*CATEGORIES, *ATTACKS, "mean", "sd"), 1.0)) for row in TABLES[key].rows]
    said = page(key, TABLES[key], MODELS["llama-3.1-8b"], TABLES[key].data[0], rows)
    beside = key in {table for table, _, _ in published()}
    assert said.count("| 1.0") >= len(rows)
    columns = [line.replace(r"\|", "").count("|") for line in said.splitlines() if line.startswith("|")]
    assert len(set(columns)) == 1
    assert ("Each cell: measured / published" in said) == beside
