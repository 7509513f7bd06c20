"""What cannot be used ends at once, with exit code 2 and a message that says what is allowed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from typer.testing import CliRunner

from lfu_reg.cli import app as app_module
from lfu_reg.cli.app import app
from lfu_reg.cli.configs import nearest_preset
from lfu_reg.cli.options import check_writable, parse_bytes
from lfu_reg.cli.presets import PRESETS

OWN = """
from typing import NamedTuple

import torch
from torch import nn

class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(4, 4)
    def forward(self, x):
        return self.one(x)

class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))
    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x

def loss(model, batch):
    return model(batch["x"]).square().mean()

def flat():
    return Flat(), {"x": torch.ones(2, 3, 4)}, loss

def deep():
    return Deep(), {"x": torch.ones(2, 3, 4)}, loss

def no_scalar():
    return Deep(), {"x": torch.ones(2, 3, 4)}, lambda model, batch: model(batch["x"])

def detached():
    return Deep(), {"x": torch.ones(2, 3, 4)}, lambda model, batch: loss(model, batch).detach()

def two():
    return Deep(), {}

def tensor():
    return Deep(), torch.ones(6, 3, 4), lambda model, x: model(x).square().mean()

class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor

ok = tensor

def pair():
    return Deep(), Pair(torch.ones(6, 3, 4), torch.ones(6)), lambda model, pair: model(pair.x).square().mean()
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    file = tmp_path / "own_model.py"
    file.write_text(OWN)
    return file


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments), env={"HF_HUB_OFFLINE": "1"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["overhead", "no-such-model"], "is no preset (tiny, small,"),
        (["inspect", "no-such-model"], "is no preset (tiny, small,"),
        (["overhead", "tiny", "--device", "abacus"], "no such kind of device"),
        (["overhead", "tiny", "--device", "meta"], "measuring knows cpu, cuda"),
        (["overhead", "tiny", "--device", "cpu:3"], "measuring knows cpu, cuda"),
        (
            ["overhead", "tiny", "--methods", "sft,magic"],
            "allowed are 'all' and a comma-separated list of sft, steering",
        ),
        (["overhead", "tiny", "--methods", ","], "allowed are 'all'"),
        (["overhead", "tiny", "--layers", "3"], "the model has 2 layers; allowed are 1 to 2"),
        (["overhead", "tiny", "--layers", "0"], "the model has 2 layers; allowed are 1 to 2"),
        (["overhead", "tiny", "--tokens", "4096"], "has 2048 positions"),
        (["overhead", "tiny", "--time-budget", "0.9"], "allowed are ratios above 1"),
        (["overhead", "tiny", "--time-budget", "nan"], "allowed are ratios above 1"),
        (["overhead", "tiny", "--memory-budget", "much"], "give a size such as 40GB"),
        (["overhead", "tiny", "--memory-budget", "-1GB"], "give a size such as 40GB"),
        (["overhead", "tiny", "--json", "/no/such/folder/file.json"], "give a file in a folder that exists"),
        (["overhead", "tiny", "--json", "/"], "give a file in a folder that exists"),
        (["inspect", "tiny", "--layers", "7"], "there is no 7"),
        (["inspect", "tiny", "--target-modules", "nothing"], "matches no linear map"),
        (["overhead", "nowhere.py:f"], "cannot be imported"),
        (["overhead", "tiny", "--alpha", "-1"], "No such option: --alpha"),
        (["overhead", "tiny", "--batch", "-1"], "--batch"),
        (["overhead", "tiny", "--tuning", "none"], "--tuning"),
        (["measure"], "measure"),
        (["overhead", "tiny", "--rounds", "4", "--time-budget", "1.5"], "--rounds 4: recommended settings"),
        (["overhead", "tiny", "--rounds", "4", "--memory-budget", "1GB"], "Give --rounds 5 or more"),
    ],
)
def test_bad_options(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.output


def test_presets_are_listed() -> None:
    listed = run("overhead", "no-such-model").stderr
    assert all(name in listed for name in PRESETS)


@pytest.mark.parametrize(
    ("slip", "preset"),
    [
        ("lama-3.1-8b", "llama-3.1-8b"),
        ("Llama-3.1-70B", "llama-3.1-70b"),
        ("qwen3-06b", "qwen3-0.6b"),
        ("tinny", "tiny"),
    ],
)
def test_a_slip_in_a_preset_is_seen_before_the_hub_is_asked(
    slip: str, preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", never)
    for command in ("overhead", "inspect"):
        result = run(command, slip)
        assert result.exit_code == 2, result.output
        assert f"did you mean {preset!r}?" in result.stderr


@pytest.mark.parametrize("name", ["gpt2-xl", "distilgpt2", "Qwen/Qwen3-0.6B", "t5-small"])
def test_names_on_the_hub_are_no_slips(name: str) -> None:
    assert nearest_preset(name) is None


def test_a_folder_is_no_slip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert nearest_preset("gpt-2") == "gpt2"
    (tmp_path / "gpt-2").mkdir()
    assert nearest_preset("gpt-2") is None


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("flat", "has neither repeated blocks nor"),
        ("no_scalar", "it has to return a real scalar"),
        ("detached", "depends on no trainable parameter"),
        ("two", "has to return (model, batch, sft_loss_fn)"),
        ("absent", "has no function 'absent'"),
    ],
)
def test_own_model_that_cannot_be_trained(own: Path, function: str, message: str) -> None:
    result = run("overhead", f"{own}:{function}")
    assert result.exit_code == 2, result.output
    assert message in result.stderr


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder that takes no file, whatever its permissions")
def test_a_folder_that_takes_no_file() -> None:
    assert "no file can be written there" in run("overhead", "tiny", "--json", "/proc/result.json").stderr


def test_trying_the_file_leaves_nothing(tmp_path: Path) -> None:
    there, new = tmp_path / "there.json", tmp_path / "new.json"
    there.write_text("before")
    for file in (there, new):
        check_writable(file)
    assert there.read_text() == "before"
    assert not new.exists()


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("overhead", ["--batch", "4"]),
        ("overhead", ["--dtype", "bfloat16", "--tuning", "full"]),
        ("overhead", ["--checkpointing"]),
        ("inspect", ["--tuning", "lora"]),
    ],
)
def test_options_that_would_change_nothing_of_an_own_model(own: Path, command: str, options: list[str]) -> None:
    result = run(command, f"{own}:deep", *options)
    assert result.exit_code == 2, result.output
    assert all(option in result.stderr for option in options if option.startswith("--"))
    assert "say it in the function" in result.stderr


@pytest.mark.parametrize("method", ["literal-steering", "authors-lora"])
def test_methods_that_an_own_model_has_not_what_for(own: Path, method: str) -> None:
    result = run("overhead", f"{own}:deep", "--rounds", "1", "--methods", method)
    assert result.exit_code == 2, result.output
    assert f"--methods: {method} need a model of transformers" in result.stderr


def test_more_threads_than_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    result = run("overhead", "tiny", "--rounds", "1", "--threads", "2")
    assert result.exit_code == 2
    assert "--threads 2: the machine has 1 processor(s); allowed are 1 to 1." in result.stderr


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    result = run("overhead", "tiny", "--device", "cuda")
    assert result.exit_code == 2
    assert "sees 0 GPU(s)" in result.stderr


def test_model_without_a_loss(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "num_hidden_layers": 2}))
    result = run("overhead", str(tmp_path))
    assert result.exit_code == 2
    assert "no language-model head, hence no loss" in result.stderr


def test_too_large_a_model_is_refused_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(setting: Any) -> None:
        raise AssertionError("the model was made")

    monkeypatch.setattr(app_module, "make_workload", never)
    monkeypatch.setattr(app_module, "available_bytes", lambda device: 100_000)
    result = run("overhead", "tiny")
    assert result.exit_code == 2, result.output
    assert "needs about" in result.stderr
    assert "0.0 GB are free. Nothing was allocated" in result.stderr


@pytest.mark.parametrize(("text", "size"), [("40GB", 40e9), ("800 MB", 8e8), ("1.5e9", 1.5e9), ("2k", 2e3)])
def test_sizes(text: str, size: float) -> None:
    assert parse_bytes(text) == pytest.approx(size)


def test_a_file_that_is_no_python(tmp_path: Path) -> None:
    (tmp_path / "typo.py").write_text("def f(:\n")
    result = CliRunner().invoke(app, ["overhead", f"{tmp_path / 'typo.py'}:f"])
    assert result.exit_code == 2
    assert "cannot be imported (invalid syntax" in " ".join(result.output.split())
