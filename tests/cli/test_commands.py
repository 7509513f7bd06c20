"""The commands end to end, on models that take milliseconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from typer.testing import CliRunner

import lfu_reg
from lfu_reg.cli import app as app_module
from lfu_reg.cli import overhead
from lfu_reg.cli.app import app
from lfu_reg.cli.configs import load_config
from lfu_reg.cli.methods import LFU, labels
from lfu_reg.cli.options import parse_layers
from lfu_reg.cli.phases import BETWEEN, PASSES
from lfu_reg.cli.plan import ROUNDS_TO_RECOMMEND
from lfu_reg.cli.presets import PRESETS
from tests.cli.test_errors import OWN
from tests.support.architectures import IS_OLDER

QUICK = ["--rounds", "2", "--batch", "4", "--tokens", "8"]
ENOUGH = ["--rounds", str(ROUNDS_TO_RECOMMEND), *QUICK[2:]]  # for recommendations
ROW = {
    "key", "method", "ms", "ms_quartiles", "ratio", "ratio_quartiles", "over_floor", "tokens_per_second", "peak_mb",
    "with_weights_mb", "phases_ms", "outside_of_passes",
}  # fmt: skip
RESULT = {
    "schema", "setting", "clock", "model", "blocks_share", "floor", "counted", "rows", "at_full_depth", "advice",
    "surroundings",
}  # fmt: skip


@pytest.fixture(autouse=True)
def uncounted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting takes a second, and has tests of its own: one command here is enough."""
    if "full" not in request.node.name:
        monkeypatch.setattr(app_module, "_counts", lambda setting: None)


def run(tmp_path: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    file = tmp_path / "result.json"
    done = CliRunner().invoke(app, [*arguments, "--json", str(file)], env={"HF_HUB_OFFLINE": "1"})
    assert done.exit_code == 0, (done.output, done.exception)
    return json.loads(file.read_text()), done.output


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_overhead_of_every_method(tmp_path: Path, tuning: str) -> None:
    result, shown = run(tmp_path, "overhead", "tiny", *QUICK, "--methods", "all", "--tuning", tuning)
    assert set(result) == RESULT
    assert result["schema"] == "lfu-reg overhead 1"
    assert {row["key"] for row in result["rows"]} == set(labels())
    for row in result["rows"]:
        assert set(row) == ROW
        assert row["ms"] > 0
        assert row["tokens_per_second"] > 0
        assert row["ratio_quartiles"][0] <= row["ratio"] <= row["ratio_quartiles"][1]
        assert row["with_weights_mb"] > row["peak_mb"] > 0
        assert (row["phases_ms"] is not None) == (row["key"] in LFU)
    assert result["rows"][0]["ratio"] == 1.0
    assert result["floor"] == pytest.approx(1 + result["blocks_share"])
    assert {"date", "commit", "torch", "transformers", "hardware"} <= set(result["surroundings"])
    assert all(label.split()[0] in shown for label in labels().values())
    assert "The floor is" in shown
    assert (result["counted"] is not None) == (tuning == "full")
    assert ("By counted operations" in shown) == (tuning == "full" and not IS_OLDER)  # which reads masks: no operations


def test_every_phase_is_timed(tmp_path: Path) -> None:
    result, shown = run(tmp_path, "overhead", "tiny", *QUICK)
    for row in result["rows"][1:]:
        assert set(row["phases_ms"]) == {*PASSES, *BETWEEN}
        assert all(milliseconds > 0 for milliseconds in row["phases_ms"].values()), row
        assert 0 < row["outside_of_passes"] < 1
    assert "perturbed backward" in shown


def test_budgets(tmp_path: Path) -> None:
    budgets = ["--time-budget", "1.6", "--memory-budget", "1GB"]
    result, shown = run(tmp_path, "overhead", "tiny", *ENOUGH, "--methods", "steering", *budgets)
    options = result["advice"]["options"]
    assert options
    assert all(option["predicted_ratio"] <= 1.6 and option["ratio"] > 0 for option in options)
    assert "Predicted within 1.6 times SFT's time and 1 GB, for a model of 2 layers; 5 rounds of each" in shown
    for option in options:
        low, high = option["ratio_quartiles"]
        assert low <= option["ratio"] <= high
        assert option["layers"] == (1 if "layers" in option["code"] else 2)
        assert f"{option['layers']} of 2" in shown
        assert f"{low:.2f} .. {high:.2f}" in shown
    result, shown = run(tmp_path, "overhead", "tiny", *ENOUGH, "--methods", "steering", "--memory-budget", "1kB")
    assert result["advice"] == {"over_memory_budget": ["LfU steering"], "options": []}


def test_recommendations_of_a_truncated_model_say_so(tmp_path: Path) -> None:
    truncated = ["--methods", "steering", "--layers", "1", "--time-budget", "3"]
    _, shown = run(tmp_path, "overhead", "tiny", *ENOUGH, *truncated)
    assert "Predicted within 3 times SFT's time, for 1 of the model's 2 layers alone" in shown


def test_truncated_model_is_extrapolated(tmp_path: Path) -> None:
    result, shown = run(tmp_path, "overhead", "tiny", *QUICK, "--methods", "steering,lora", "--layers", "1")
    full, row = result["at_full_depth"], result["rows"][2]
    assert full["layers"] == 2
    share = result["blocks_share"]
    assert full["floor"] == pytest.approx(1 + 2 * share / (1 + share), abs=2e-4)
    # With one layer steering repeats none, and with two it repeats one.
    assert full["ratios"]["steering"] == pytest.approx(1 + share / (1 + share), abs=2e-3)
    assert full["ratios"]["lora"] == pytest.approx(1 + (row["ratio"] - 1) * 2 / (1 + share), abs=2e-3)
    assert "Estimated for all 2 layers" in shown


def test_checkpointing_keeps_less(tmp_path: Path) -> None:
    plain, _ = run(tmp_path, "overhead", "tiny", *QUICK, "--methods", "steering")
    less, _ = run(tmp_path, "overhead", "tiny", *QUICK, "--methods", "steering", "--checkpointing")
    assert all(b["peak_mb"] < a["peak_mb"] for a, b in zip(plain["rows"], less["rows"], strict=True))


def test_floor_of_compiled_steps_is_that_of_eager_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"sft": 1.0, "eager sft": 2.0, "blocks": 1.5, "steering": 1.8}
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: None)
    monkeypatch.setattr(overhead, "interleaved", lambda methods, *a, **k: {m.key: [times[m.key]] for m in methods})
    result, _ = run(tmp_path, "overhead", "tiny", *QUICK, "--methods", "steering", "--compile")
    assert result["floor"] == 1.75
    assert result["rows"][1]["ratio"] == 1.8


def test_compiled_methods_have_graphs_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them are module trees of the same classes, with other hooks."""
    compile_it = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_it(module, backend="eager"))
    methods = ["sft", *LFU, "lora-late", "retained", "literal-lora"]
    # Beyond the limit nothing is compiled any more. The second name is torch 2.6's.
    limit = "recompile" if hasattr(torch._dynamo.config, "fail_on_recompile_limit_hit") else "cache"
    with torch._dynamo.config.patch({f"fail_on_{limit}_limit_hit": True}):
        result, _ = run(tmp_path, "overhead", "tiny", *QUICK, "--compile", "--methods", ",".join(methods))
    assert [row["key"] for row in result["rows"]] == methods


def test_own_model(tmp_path: Path) -> None:
    (tmp_path / "own_model.py").write_text(OWN)
    result, shown = run(tmp_path, "overhead", f"{tmp_path / 'own_model.py'}:deep", "--rounds", "2")
    assert result["counted"] is None
    assert [row["key"] for row in result["rows"]] == ["sft", *LFU]
    words = " ".join(shown.split())  # lines are broken somewhere
    assert "batch of its own" in words
    assert "4 x 128 tokens" not in words


def test_a_function_is_named_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "own_model.py").write_text(OWN)
    _, shown = run(tmp_path, "overhead", f"{tmp_path / 'own_model.py'}:ok", "--rounds", "1", "--methods", "steering")
    assert "own_model.py:ok: 3 layers" in " ".join(shown.split())  # and no emoji


def test_the_longest_samples_of_presets() -> None:
    positions = {name: getattr(load_config(name), "max_position_embeddings", None) for name in PRESETS}
    assert positions["llama-2-7b"] == 4096
    assert positions["llama-3.1-8b"] == 131072


@pytest.mark.parametrize("function", ["tensor", "pair"])
def test_own_batch_that_is_no_mapping(tmp_path: Path, function: str) -> None:
    (tmp_path / "own_model.py").write_text(OWN)
    budget = [*ENOUGH[:2], "--methods", "steering", "--time-budget", "1.01"]
    result, _ = run(tmp_path, "overhead", f"{tmp_path / 'own_model.py'}:{function}", *budget)
    assert result["model"]["tokens_per_step"] == 6


def test_local_folder(tmp_path: Path) -> None:
    from transformers import T5Config

    T5Config(d_model=16, d_ff=16, d_kv=8, num_layers=2, num_heads=2, vocab_size=32).save_pretrained(tmp_path / "t5")
    result, _ = run(tmp_path, "overhead", str(tmp_path / "t5"), *QUICK, "--tuning", "full", "--methods", "steering")
    assert result["model"]["layers"] == 4  # both stacks


def test_inspect_allocates_nothing_of_an_8b_model(tmp_path: Path) -> None:
    result, shown = run(tmp_path, "inspect", "llama-3.1-8b", "--layers", "early", "--tokens", "512")
    assert result["model"]["parameters"] == 8_030_261_248
    assert [layer["name"] for layer in result["layers"]] == [f"model.layers.{i}" for i in range(11)]
    assert len(result["linears"]) == 11 * 7
    down = next(entry for entry in result["linears"] if entry["name"] == "model.layers.9.mlp.down_proj")
    assert (down["in"], down["out"], down["parameters"]) == (14336, 4096, 8 * (14336 + 4096))
    assert result["auxiliaries"]["steering"] == {"parameters": 11 * 4096, "mb": pytest.approx(0.36)}
    assert result["auxiliaries"]["lora"]["parameters"] == sum(entry["parameters"] for entry in result["linears"])
    assert result["clean_states_mb"] == pytest.approx(11 * 512 * 4096 * 2 / 1e6, abs=1e-3)
    assert "model.layers.0-10.mlp.down_proj" in shown


def test_inspect_fits_on_a_screen(tmp_path: Path) -> None:
    result, shown = run(tmp_path, "inspect", "llama-3.1-70b")
    assert len(result["linears"]) == 80 * 7  # all of them in the file
    lines = shown.splitlines()
    assert len(lines) <= 30
    (up,) = [line for line in lines if "up_proj" in line]
    assert "model.layers.0-79.mlp.up_proj" in up
    assert "x80" in up
    assert sum("x80" in line for line in lines) == 1 + 7  # the blocks and their linear maps


def test_version() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert done.exit_code == 0
    assert done.output == f"lfu-reg {lfu_reg.__version__}\n"


def test_inspect_targets(tmp_path: Path) -> None:
    result, _ = run(tmp_path, "inspect", "tiny", "--target-modules", "q_proj,v_proj", "--auxiliary", "steering")
    assert len(result["linears"]) == 4


@pytest.mark.parametrize(
    ("text", "choice"), [("all", "all"), ("3", 3), ("[0, 1]", [0, 1]), ("0,1", [0, 1]), (r".*\.0", r".*\.0")]
)
def test_layers_as_the_library_takes_them(text: str, choice: object) -> None:
    assert parse_layers(text) == choice


@pytest.mark.parametrize(("arguments", "says"), [(["--help"], "overhead"), (["inspect", "tiny"], "q_proj")], ids=str)
def test_module_runs(arguments: list[str], says: str) -> None:
    """In a process of its own, in which nothing has been imported before."""
    done = subprocess.run([sys.executable, "-m", "lfu_reg.cli", *arguments], capture_output=True, text=True, check=True)
    assert says in done.stdout


def test_names_in_any_case(tmp_path: Path) -> None:
    result, _ = run(tmp_path, "inspect", "tiny", "--auxiliary", "LoRA", "--tuning", "Full", "--dtype", "Float32")
    assert len(result["linears"]) == 14


def test_a_command_says_nothing_of_others() -> None:
    """Libraries that PEFT loads tell of what they cannot load, and transformers of what it will rename."""
    arguments = [sys.executable, "-m", "lfu_reg.cli", "inspect", "tiny", "--tuning", "lora"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert done.stderr == ""
