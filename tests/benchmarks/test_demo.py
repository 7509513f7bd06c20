"""The demo from its command line to its files."""

import json
import math
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")

import torch
from demo import __main__ as demo
from demo.measure import measure_costs, peak_memory
from demo.methods import BASELINE, CHOSEN, METHODS
from demo.options import UsageError, check, chosen_methods, chosen_recipe, parse_arguments
from demo.report import summarize
from demo.sweep import CSV_FILE, read_runs
from demo.sweep_rule import GRIDS, Cell, choose_learning_rate, choose_setting, neighbourhood_score
from demo.train import Recipe

ROOT = Path(__file__).resolve().parents[2]
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"
QUICK = ["--steps", "2", "--seeds", "1", "--train-size", "8", "--eval-size", "8", "--timing-rounds", "1"]


def options(*argv):
    return parse_arguments(list(argv), "")


def read_results(out):
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


def test_default_task_end_to_end(tmp_path, capsys):
    demo.main([*QUICK, "--methods", "sft", "lfu-lora", "lfu-steering", "--out", str(tmp_path)])
    results = read_results(tmp_path)
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    assert set(results["methods"]) == set(results["cost"]) == {"sft", "lfu-lora", "lfu-steering"}
    assert results["cost"]["sft"]["ratio"] == 1.0
    assert all(cost["peak_bytes"] > 0 and cost["step_ms"] > 0 for cost in results["cost"].values())
    assert set(results["summary"]) == {"clean answers", "30% wrong answers"}
    assert len(results["runs"]) == 6
    for run in results["runs"]:
        assert {"in_domain", "retention", "variation_mean", "variation_spread", "curve"} <= set(run)
        assert len(run["retention_parts"]) == 5
        assert len(run["variations"]) >= 5
        assert len(run["curve"]["sft_loss"]) == 2
    assert {"before", "command", "environment", "settings", "notes", "seconds"} <= set(results)
    out = capsys.readouterr().out
    assert "Downloads: nothing" in out
    assert str(tmp_path / "results.json") in out
    assert str(tmp_path / "results.png") in out


def test_methods_of_one_seed_start_from_the_same_point(tmp_path):
    demo.main([*QUICK, "--lam", "0", "--label-noise", "0", "--out", str(tmp_path)])
    losses = [run["curve"]["sft_loss"] for run in read_results(tmp_path)["runs"]]
    assert len(losses) >= 3
    for other in losses[1:]:  # with lambda at 0 all methods are plain fine-tuning
        assert other == pytest.approx(losses[0], rel=1e-4)


def test_own_model_and_pairs(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder, pairs, text = tmp_path / "model", tmp_path / "pairs.jsonl", tmp_path / "text.txt"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(demo.EMBEDDED_MODEL)
    tokenizer.pad_token = None  # as in GPT-2
    tokenizer.save_pretrained(folder)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=2, n_head=2)
    ).save_pretrained(folder)
    rows = [{"instruction": f"Say {n}.", "input": "now", "output": str(n)} for n in range(20)]
    pairs.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    text.write_text("A general text. " * 40, encoding="utf-8")
    own = ["--model", str(folder), "--data", str(pairs), "--retention-file", str(text)]
    demo.main([*QUICK, *own, "--tuning", "full", "--exact-match", "--out", str(tmp_path / "out")])
    results = read_results(tmp_path / "out")
    assert results["metric_names"] == {
        "in_domain": "accuracy",
        "retention": "perplexity",
        "retention_of": "general text",
    }
    assert list(results["summary"]) == ["clean answers"]
    assert results["methods"]["lfu-lora"] == {"label": "LfU (LoRA)", "alpha": 0.1, "lam": 5.0}  # the paper's
    assert results["before"]["retention"] > 1
    assert results["settings"]["max_length"] == 64  # the model's positions, although more were allowed


@pytest.mark.skipif(not GSM8K.is_dir(), reason="the shared data is not there")
def test_gsm8k_with_the_embedded_model(tmp_path):
    quick = [*QUICK, "--steps", "1", "--max-length", "96", "--methods", "sft", "lfu-steering"]
    demo.main([*quick, "--data", str(GSM8K), "--out", str(tmp_path)])
    results = read_results(tmp_path)
    assert results["metric_names"]["in_domain"] == "token accuracy"
    assert set(results["before"]["retention_parts"]) == {"add", "max", "sort", "reverse", "capitals"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "gpt2"], "--model without --data"),
        (["--exact-match"], "add --data"),
        (["--steps", "0"], "--steps 0: must be a number greater than 0"),
        (["--lr", "nan"], "--lr nan"),
        (["--label-noise", "30"], "from 0 to 1"),
        (["--max-length", "2"], "at least 8"),
        (["--alpha", "sft=1"], "'sft' is no LfU method of this run"),
        (["--lam", "much"], "'much' is no number"),
        (["--alpha", "-1"], "--alpha -1: must be a finite number, 0 or greater"),
        (["--lam", "lfu-lora=inf"], "--lam lfu-lora=inf: must be a finite number"),
        (["--data", "missing.jsonl"], "no such file"),
        (["--device", "nonsense"], "--device nonsense: cannot be used"),
    ],
)
def test_bad_options_end_in_one_clear_line(tmp_path, argv, message):
    with pytest.raises(SystemExit, match=message) as error:
        demo.main([*argv, "--out", str(tmp_path)])
    assert "\n" not in str(error.value)


def test_settings_come_from_the_command_line_then_the_sweep_then_the_paper():
    methods = {m.key: m for m in chosen_methods(options("--alpha", "0.7", "lfu-lora=0.3"))}
    assert (methods["lfu-lora"].alpha, methods["lfu-steering"].alpha) == (0.3, 0.7)
    assert methods["lfu-lora"].lam == CHOSEN["lfu-lora"][1]
    own = {m.key: m for m in chosen_methods(options("--model", "m", "--data", "d"))}
    assert own["lfu-lora"].alpha is None
    assert own["lfu-lora"].lam is None


def test_epochs_become_steps():
    assert chosen_recipe(options("--epochs", "3", "--train-size", "32", "--batch-size", "8")).steps == 12
    with pytest.raises(UsageError):
        check(options("--epochs", "-1"))


def test_peak_memory_counts_what_lives_at_the_same_time():
    megabyte = torch.empty(250_000, dtype=torch.float32).nbytes

    def step():
        first = torch.zeros(250_000)
        second = torch.zeros(250_000)
        del first
        third = torch.zeros(250_000)
        del second, third

    assert peak_memory(step, torch.device("cpu")) == pytest.approx(2 * megabyte, rel=0.01)


def test_costs_without_the_baseline_have_no_ratio():
    from demo.data import collate, encode
    from demo.load import EMBEDDED_MODEL, load_model
    from demo.skills import Example

    model, tokenizer = load_model(str(EMBEDDED_MODEL), torch.device("cpu"), torch.float32)
    batch = collate([encode(tokenizer, Example("1+1=", "2"), 32)], tokenizer.pad_token_id, torch.device("cpu"))
    (cost,) = measure_costs(model, [METHODS["lfu-steering"]], batch, Recipe(), rounds=1).values()
    assert math.isnan(cost.ratio)
    assert cost.step_ms > 0


def test_summary_is_mean_and_sample_standard_deviation():
    keys = ("in_domain", "in_domain_loss", "retention", "variation_mean", "variation_spread", "final_sft_loss")
    runs = [{"regime": "r", "method": "m", "seed": s, **dict.fromkeys(keys, float(s))} for s in (1, 2, 3)]
    assert summarize(runs)["r"]["m"]["retention"] == {"mean": 2.0, "std": 1.0}


def test_neighbours_damp_a_lucky_cell():
    alphas, lams = GRIDS["lfu-lora"]
    scores = {Cell("lfu-lora", 1e-3, a, lam): 0.5 for a in alphas for lam in lams}
    corner, middle = Cell("lfu-lora", 1e-3, alphas[0], lams[0]), Cell("lfu-lora", 1e-3, alphas[1], lams[1])
    scores[corner] = 0.8
    assert neighbourhood_score(corner, scores) == pytest.approx(0.6)
    assert neighbourhood_score(middle, scores) == pytest.approx(0.5)


@pytest.mark.skipif(not CSV_FILE.is_file(), reason="the sweep has not been run")
def test_demo_uses_what_the_sweep_chose():
    runs = read_runs()
    assert choose_learning_rate(runs) == Recipe.lr
    assert {BASELINE, *GRIDS} == {run.cell.method for run in runs}
    for method, setting in CHOSEN.items():
        cell = choose_setting(runs, method, Recipe.lr)
        assert (cell.alpha, cell.lam) == setting
