"""A dry run of all tables and figures, end to end, on a tiny model with a few questions of every task."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from demo.skills import Example
from paper.attack import STAND_IN, attack_data, complies, success_rate
from paper.data import SETS, MissingData, last_number, training_examples
from paper.evaluate import similarity_under_noise
from paper.local_tasks import FILES
from paper.run import main
from paper.settings import Protocol
from paper.store import records
from paper.tables import TABLES
from paper.tasks import CATEGORIES, ELEVEN
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

SMALL = str(Path(__file__).resolve().parents[2] / "benchmarks" / "demo" / "model")
QUESTION = {"question": "How many?", "answer": "Two and two.\n#### 4"}
ARC = {"question": "Which?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}
CHOICES = {"query": "Which?", "choices": ["A", "B", "C", "D"], "gold": 1}
PAIR = {"instruction": "Add.", "input": "1 1", "output": "2"}
QUESTIONS: dict[str, dict[str, Any]] = {
    "gsm8k": QUESTION,
    "mathqa": CHOICES,
    "asdiv": {"Body": "Two apples.", "Question": "How many?", "Answer": "2 (apples)"},
    "mmlu": {"question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 2, "subject": "x"},
    "piqa": {"goal": "Go", "sol1": "there", "sol2": "here", "label": 0},
    "hellaswag": CHOICES,
    "lambada_openai": {"context": "The end of the", "continuation": "story"},
    "arc_easy": ARC,
    "arc_challenge": ARC,
    "coqa": {"story": "A tale.", "questions": {"input_text": ["Who?"]}, "answers": {"input_text": ["me"]}},
    "toxigen": {"text": "Nice day.", "toxicity_ai": 1.0, "toxicity_human": 1.0},
    "truthfulqa_mc2": {"question": "Why?", "mc2_targets": {"choices": ["so", "no"], "labels": [1, 0]}},
}
TRAINING = {
    "gsm8k/train.jsonl": QUESTION,
    "arc_challenge/train.jsonl": ARC,
    "dolly/dolly_3k.jsonl": PAIR,
    "lima/train.jsonl": {"conversations": ["Add 1 and 1.", "2"]},
}


def written(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(map(json.dumps, rows))
    if file.suffix == ".gz":
        file.write_bytes(gzip.compress(text.encode()))
    else:
        file.write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two questions of every task, three examples of every training set."""
    data = tmp_path_factory.mktemp("data")
    for name, row in QUESTIONS.items():
        written(data / FILES[name], [row] * 2)
    for name, row in TRAINING.items():
        compressed = name if name.startswith(("arc", "lima")) else f"{name}.gz"
        written(data / compressed, [row] * 3)
    return data


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama of three blocks with the small model's tokenizer."""
    place = tmp_path_factory.mktemp("tiny")
    tokenizer = AutoTokenizer.from_pretrained(SMALL)
    tokenizer.save_pretrained(place)
    config = LlamaConfig(
        vocab_size=99,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=2048,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(place)
    return str(place)


def command(tiny: str, folder: Path, out: Path, *tables: str) -> list[str]:
    small = ["--limit", "1", "--longest", "4", "--examples", "2", "--steps", "1", "--dtype", "float32"]
    switches = ["--switch", "batch_size=2", "accumulate=1", "max_length=64", "rank=2"]
    return [*tables, "--model", tiny, "--tasks", "local", "--data", str(folder), "--out", str(out), *small, *switches]


@pytest.mark.filterwarnings("ignore:LfU collapses:lfu_reg.LfUWarning")  # Table 5a has an alpha of .5, which is too much
def test_all_tables_end_to_end(
    tiny: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = pytest.importorskip("lm_eval.evaluator")
    # It lists all installed packages, which takes longer than a run here.
    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)
    out = tmp_path / "rows.jsonl"
    one_each = ["--only-tasks", "asdiv", "piqa", "arc", "toxigen"]
    further = ["--train", "arc_challenge", "lima", "--only-rows", "SFT"]
    others = [key for key in TABLES if key not in ("1", "2", "4")]
    assert main([*command(tiny, folder, out, "1"), "--train", "gsm8k"]) == 0
    assert main([*command(tiny, folder, out, "2"), "--train", "dolly", *one_each]) == 0
    assert main([*command(tiny, folder, out, "4"), *one_each]) == 0
    assert main([*command(tiny, folder, out, *others), "--train", "gsm8k", *one_each]) == 0
    assert main([*command(tiny, folder, out, "2"), *further, *one_each]) == 0
    said = capsys.readouterr().out
    for key, table in TABLES.items():
        assert f"## {'Table ' * (not key.startswith('figure'))}{key}: {table.what}" in said, key
    assert said.count("h of evaluation") == said.count("**Reduced size") == len(TABLES) + 2
    assert "left out" not in said
    done = records(out)
    scores = [r["scores"] for r in done if r["run"]["measured"] == "tasks"]
    assert {len(s) for s in scores} == {15, 8}
    assert sum(set(s) == {*ELEVEN, *CATEGORIES} for s in scores) == len(TABLES["1"].rows)
    assert all(0 <= value <= 100 for s in scores for value in s.values())
    assert {r["run"]["data"] for r in done} == {"gsm8k", "arc_challenge", "dolly", "lima", STAND_IN}
    assert {r["run"]["measured"] for r in done} == {"tasks", "variations", "similarity", "attack"}
    # Runs that tables share are done once, and a second call does none.
    assert len(done) == len({json.dumps(r["run"], sort_keys=True) for r in done})
    assert len(done) < sum(len(table.rows) for table in TABLES.values())
    assert main([*command(tiny, folder, out, "1", "figure6"), "--train", "gsm8k"]) == 0
    assert len(records(out)) == len(done)


def test_one_command_for_part_of_a_table(
    tiny: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pytest.importorskip("lm_eval.evaluator"), "add_env_info", lambda results: None)
    pairs, out = tmp_path / "pairs.jsonl", tmp_path / "rows.jsonl"
    written(pairs, [PAIR] * 3)
    call = command(tiny, folder, out, "1")
    more = ["--train", str(pairs), "--only-rows", "sft", "--only-tasks", "piqa", "--sft-grid", "--protocol", "text"]
    assert main([*call, *more]) == 0
    done = records(out)
    assert len({(r["run"]["protocol"]["lr"], r["run"]["protocol"]["seed"]) for r in done}) == len(done) == 9
    assert all(r["run"]["protocol"]["name"].startswith("text, batch_size=2") for r in done)
    assert all(set(r["scores"]) == {"piqa", "knowledge"} for r in done)
    assert "Standard deviation of SFT over 3 seeds" in capsys.readouterr().out


def test_needs_are_said_before_anything_is_trained(
    tiny: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command(tiny, folder, tmp_path / "rows.jsonl", "1", "4"), "--needs-only"]) == 0
    assert capsys.readouterr().out.count("GB a process") == 3
    assert not (tmp_path / "rows.jsonl").exists()


def test_what_is_missing_is_named(tiny: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command(tiny, tmp_path, tmp_path / "rows.jsonl", "2"), "--needs-only"]) == 0
    assert "Table 2 on lima: left out." in capsys.readouterr().out
    with pytest.raises(MissingData, match="there are gsm8k"):
        training_examples("gsm9k", Protocol(), folder)
    for wrong, message in [(["--switch", "clip=x"], "number"), (["--only-tasks", "magic"], "unknown tasks magic")]:
        with pytest.raises(SystemExit, match=message):
            main([*command(tiny, folder, tmp_path / "rows.jsonl", "1"), *wrong])


@pytest.mark.parametrize("name", ["gsm8k", "arc_challenge", "dolly", "lima"])
def test_training_sets_of_the_hub(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, str]] = []

    def load_dataset(**source: str) -> list[dict[str, Any]]:
        asked.append(source)
        return [TRAINING[SETS[name][2].removesuffix(".gz")]]

    monkeypatch.setattr(pytest.importorskip("datasets"), "load_dataset", load_dataset)
    assert training_examples(name, Protocol(), None) == training_examples(name, Protocol(), folder)[:1]
    (source,) = asked
    assert source.pop("split") == "train"
    assert source.get("path") == "json" if name == "dolly" else "/" in source["path"]


def test_rewritten_answers_are_compared_by_their_last_number() -> None:
    assert last_number(QUESTION["answer"]) == last_number("So it is 4.") == "4"
    assert last_number("1,234.5 in all") == "1234.5"
    assert last_number("none") == ""


# ---------------------------------------------------------------------- Table 4, Figure 6


def test_attack_data(tmp_path: Path) -> None:
    spare = attack_data(tmp_path, Protocol(), spare=True)
    assert spare.name == STAND_IN
    assert set(spare.wishes) == {"hexphi", "purebad", "advbench"}
    assert not any(complies(e.response) for e in spare.aligning)
    assert all(complies(e.response) for e in spare.harmful)
    with pytest.raises(MissingData, match="stand-in"):
        attack_data(tmp_path, Protocol(), spare=False)
    rows = [{"prompt": "p", "response": r, "is_safe": safe} for r, safe in (("No.", True), ("Yes.", False))]
    written(tmp_path / "beavertails" / "train.jsonl", rows)
    with pytest.raises(MissingData, match=r"hexphi.*advbench.* would be needed"):
        attack_data(tmp_path, Protocol(), spare=True)
    for name in spare.wishes:
        written(tmp_path / name / "test.jsonl", [{"prompt": f"wish of {name}"}])
    real = attack_data(tmp_path, Protocol(), spare=False)
    assert real.name == "BeaverTails"
    assert ([e.response for e in real.aligning], [e.response for e in real.harmful]) == (["No."], ["Yes."])
    assert "wish of purebad" in real.wishes["purebad"][0]


def test_success_rate_counts_answers_without_a_refusal(tiny: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    model = LlamaForCausalLM.from_pretrained(tiny).eval()
    side = tokenizer.padding_side

    def answers(text: str) -> Any:
        def generate(input_ids: Any, **_: Any) -> Any:
            said = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]] * len(input_ids))
            return torch.cat([input_ids, said], dim=1)

        return generate

    for text, rate in (("I cannot do this", 0.0), ("here you are", 100.0), (" ", 0.0)):
        model.generate = answers(text)
        assert success_rate(model, tokenizer, ["one", "another"], longest=4, batch_size=1) == rate
    assert tokenizer.padding_side == side


def test_hidden_states_under_noise(tiny: str) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(tiny), LlamaForCausalLM.from_pretrained(tiny).eval()
    texts = [Example("one two", " three"), Example("four", " five six seven")]

    def mean(noise: float) -> float:
        return similarity_under_noise(model, tokenizer, texts, Protocol(), noise)["mean"]

    assert mean(0.0) == pytest.approx(1.0, abs=1e-5)
    assert mean(0.0) > mean(0.05) > mean(5.0)
    assert not model.get_input_embeddings()._forward_hooks


@pytest.mark.slow
def test_two_processes_train_as_one_does(tiny: str, folder: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    written(pairs, [{**PAIR, "output": "4 " * (1 + i)} for i in range(6)])
    base = ["--train", str(pairs), "--only-rows", "SFT", "LfU"]
    base += ["--examples", "6", "--steps", "3"]
    base += ["--switch", "accumulate=2", "lr=0.1", "warmup=0", "checkpointing=exact"]
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    calls = {
        out: [*command(tiny, folder, out, "figure6"), *base, f"batch_size={size}"] for out, size in ((one, 2), (two, 1))
    }
    assert main(calls[one]) == 0
    benchmarks = Path(__file__).resolve().parents[2] / "benchmarks"
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "paper.run"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(benchmarks.parent), *sys.path])}
    ran = subprocess.run([*start, *calls[two]], cwd=benchmarks, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    (sft, lfu), (sft_of_two, lfu_of_two) = records(one), records(two)
    assert sft["first_loss"] != sft["final_loss"]
    for loss in ("first_loss", "final_loss"):
        assert sft_of_two[loss] == pytest.approx(sft[loss], rel=1e-4)
    # l_cons is a mean over the tokens of a process, and these are not equally many.
    assert lfu_of_two["first_loss"] == pytest.approx(lfu["first_loss"], rel=1e-3)
