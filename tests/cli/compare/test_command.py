"""`lfu-reg compare` from its command line to its files, on a model that takes milliseconds a step."""

from __future__ import annotations

import html
import inspect
import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

from typer.testing import CliRunner

from lfu_reg.cli.app import app
from lfu_reg.cli.compare import command, experiment, training
from lfu_reg.cli.compare.encoding import Tokens
from lfu_reg.cli.compare.plan import Setting
from lfu_reg.cli.compare.scoring import divergence, log_probabilities, score
from lfu_reg.cli.compare.store import Store
from lfu_reg.cli.errors import Unusable
from tests.cli.compare.support import SMALL

QUICK = ["--steps", "2", "--batch", "4", "--tokens", "48", "--train", "8", "--held-out", "4", "--threads", "1"]
FEW = ["--rates", "1e-3,4e-3", "--scales", "0.5", "--strengths", "1"]
FEW += ["--lfu-steps", "exact,one-backward", "--seeds", "1"]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"What is {n} minus 7? ", "completion": str(n - 7)} for n in range(20, 40)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["compare", *arguments], env={"HF_HUB_OFFLINE": "1"})


def finished(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]


def test_end_to_end_and_again(tmp_path: Path, rows: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("max 12 55 31=55 " * 20)
    call = [str(SMALL), str(rows), "--keep", str(text), "--out", str(out), *QUICK, *FEW]
    done = run(*call)
    assert done.exit_code == 0, (done.output, done.exception)
    base, *runs = finished(out)
    assert base["run"] == "base"
    assert [row["step"] for row in runs] == [None, None, "exact", "one-backward"]
    best = min(runs[:2], key=lambda row: row["points"][-1]["domain"]["loss"])["rate"]
    assert {row["rate"] for row in runs[2:]} == {best}
    for row in runs:
        assert [point["scale"] for point in row["points"]] == [0.5, 1.0]
        assert set(row["points"][0]["kept"]) == {"text.txt"}
        assert len(row["step_seconds"]) == len(row["train_loss"]) == 2
        assert row["peak_mb"] > 0
        assert len(row["samples"]) == 3
        assert (out / "adapters" / row["run"] / "adapter_config.json").exists()
    assert runs[2]["figures"]["gradient_ratio"] > 0
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((out / "summary.json").read_text())
    assert summary["verdict"][0].split()[0] in ("One", "Nothing", "LfU")
    assert [gap["margin"] for gap in summary["gaps"]] == [None, None]
    for part in ("LfU 1, one-backward", "adapter x 0.5", "Verdict", "base model", "data: ", "KL to base"):
        assert part in done.output

    assert CliRunner().invoke(app, ["report", str(out)]).exit_code == 0
    page = (out / "report.html").read_text()
    assert all(html.escape(line) in page for line in summary["verdict"])
    assert "What is 2" in page  # of a question

    again = run(*call)  # nothing is done again, and more seeds go on
    assert "0 trainings to do, 4 done already" in again.output
    more = run(*call[:-1], "2")
    assert "4 trainings to do, 4 done already" in more.output
    assert len(finished(out)) == 9


def test_saved_adapters_are_pefts(tmp_path: Path, rows: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run(str(SMALL), str(rows), "--out", str(tmp_path / "out"), *QUICK, *FEW)
    row = finished(tmp_path / "out")[-1]
    base = AutoModelForCausalLM.from_pretrained(SMALL)
    model = PeftModel.from_pretrained(base, tmp_path / "out" / "adapters" / row["run"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(SMALL)
    setting = command.Setting(str(SMALL), rows, train=8, held_out=4, tokens=48)
    held_out = command.prepare(setting).held_out
    assert score(model, held_out, tokenizer.pad_token_id, "cpu") == pytest.approx(row["points"][-1]["domain"])
    assert row["points"][-1]["kl"] > 0


def test_methods_start_from_the_same_adapter_and_rows(tmp_path: Path, rows: Path) -> None:
    run(str(SMALL), str(rows), "--out", str(tmp_path), *QUICK, *FEW[2:], "--rates", "1e-3", "--steps", "3")
    _, sft, *lfu = finished(tmp_path)
    assert len(lfu) == 2
    for row in lfu:
        assert row["train_loss"][0] == pytest.approx(sft["train_loss"][0], rel=1e-5)
        assert row["train_loss"][2] != pytest.approx(sft["train_loss"][2], rel=1e-5)


def test_ctrl_c_keeps_what_is_done(tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = [str(SMALL), str(rows), "--out", str(tmp_path / "out"), *QUICK, *FEW]
    real, calls = experiment.train, []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments[1])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(experiment, "train", interrupted)
    stopped = run(*call)
    assert stopped.exit_code == command.STOPPED
    assert "Stopped. 2 trainings are kept" in stopped.output
    assert "Nothing can be said of LfU: none of its runs is finished" in stopped.output
    with (tmp_path / "out" / "runs.jsonl").open("a") as file:
        file.write('{"run": "lfu')  # a line that was cut off
    on = run(*call)
    assert on.exit_code == 0, (on.output, on.exception)
    assert "2 trainings to do, 2 done already" in on.output
    assert len(finished(tmp_path / "out")) == 5


def test_diverged_runs_are_reported(tmp_path: Path, rows: Path) -> None:
    done = run(str(SMALL), str(rows), "--out", str(tmp_path), *QUICK, *FEW[2:], "--rates", "1e-3,1e30")
    assert done.exit_code == 0, (done.output, done.exception)
    assert "Diverged, and left out: sft_rate-1e+30_seed-0." in done.output
    assert {row["rate"] for row in finished(tmp_path)[3:]} == {1e-3}


def test_warnings_are_repeated_in_the_end(tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = experiment.train

    def warned(*arguments: Any, **options: Any) -> Any:
        warnings.warn("something is odd", UserWarning, stacklevel=1)
        return real(*arguments, **options)

    monkeypatch.setattr(experiment, "train", warned)
    done = run(str(SMALL), str(rows), "--out", str(tmp_path), *QUICK, *FEW)
    assert done.output.count("Warning, while training: something is odd") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{small}", "missing.jsonl"], "DATA missing.jsonl: there is no such file"),
        (["{small}", "{nonsense}"], "line 1: not JSON"),
        (["{small}", "{rows}", "--keep", "missing.txt"], "--keep missing.txt: there is no such file"),
        (["{small}", "{rows}", "--tokens", "8"], "0 of 20 different rows have at most 8 tokens; at least 8 are needed"),
        (["{small}", "{rows}", "--tokens", "4096"], "positions. Give at most that."),
        (["tiny", "{rows}"], "a preset has random weights"),
        (["./nowhere", "{rows}"], "there is no such folder"),
        (["no-such-owner/no-such-model", "{rows}"], "its configuration cannot be loaded"),
        (["{empty}", "{rows}"], "the folder has no config.json"),
        (["{broken}", "{rows}"], "cannot be loaded"),
        (["{small}", "{rows}", "--rates", "fast"], "--rates fast: give numbers greater than 0"),
        (["{small}", "{rows}", "--rates", "0"], "--rates 0: give numbers greater than 0"),
        (["{small}", "{rows}", "--strengths", "inf"], "--strengths inf: give numbers"),
        (["{small}", "{rows}", "--scales", "2"], "--scales 2: allowed are numbers between 0 and 1"),
        (["{small}", "{rows}", "--lfu-steps", "three"], "--lfu-steps three: allowed are exact, one-backward"),
        (
            ["{small}", "{rows}", "--auxiliary", "magic"],
            "--auxiliary magic: allowed are lora, steering, weights, random",
        ),
        (["{small}", "{rows}", "--dtype", "int8"], "--dtype int8: allowed are float32, bfloat16"),
        (["{small}", "{rows}", "--device", "abacus"], "no such kind of device"),
        (["{small}", "{rows}", "--out", "{rows}"], "cannot be used"),
        (["{small}", "{rows}", "--keep", "{rows}", "--keep", "{rows}"], "two of the files have the same name"),
    ],
)
def test_what_cannot_be_used(tmp_path: Path, rows: Path, arguments: list[str], message: str) -> None:
    for folder in ("empty", "broken"):
        (tmp_path / folder).mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    (tmp_path / "nonsense.jsonl").write_text("It was a dark and stormy night.\n" * 5)
    places = {"small": SMALL, "rows": rows, "nonsense": tmp_path / "nonsense.jsonl"}
    places |= {name: tmp_path / name for name in ("empty", "broken")}
    given = [argument.format(**places) for argument in arguments]
    done = run(*given, *([] if "--out" in given else ["--out", str(tmp_path / "out")]))
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_rows_of_another_setting_are_not_mixed(tmp_path: Path, rows: Path) -> None:
    model = shutil.copytree(SMALL, tmp_path / "model")
    call = [str(model), str(rows), "--out", str(tmp_path / "out"), *QUICK, *FEW[2:], "--rates", "1e-3"]
    run(*call)
    other = run(*call, "--steps", "3")
    assert other.exit_code == 2
    assert "steps was 2 and is 3" in other.stderr
    before = rows.read_text()
    rows.write_text(before.replace("minus 7", "minus 8"))
    assert "rows was" in run(*call).stderr
    rows.write_text(before)
    content = bytearray((model / "model.safetensors").read_bytes())
    content[-1] ^= 1  # as if it had been trained further
    (model / "model.safetensors").write_bytes(content)
    assert "weights was" in run(*call).stderr


@pytest.mark.parametrize("written", ["[]", '{"setting": []}', '{"setting": 3}', "null", "{"])
def test_a_folder_with_a_setting_of_something_else(written: str, tmp_path: Path) -> None:
    (tmp_path / "setting.json").write_text(written)
    with pytest.raises(Unusable, match="Give another folder"):
        Store(tmp_path, Setting("model", tmp_path / "rows"), "rows", "weights")


def test_lines_that_are_no_rows_are_cut_off(tmp_path: Path) -> None:
    """A torn line, another program's line, and what a full disk left."""
    store = Store(tmp_path, Setting("model", tmp_path / "rows"), "rows", "weights")
    store.add({"run": "base", "point": 1})
    with (tmp_path / "runs.jsonl").open("ab") as file:
        file.write(b'{"hello": 1}\n\xff\xfe\x00\n{"run": "sft')
    again = Store(tmp_path, Setting("model", tmp_path / "rows"), "rows", "weights")
    assert again.base == {"run": "base", "point": 1}
    assert again.rows == []
    assert finished(tmp_path) == [again.base]


def test_too_little_memory(tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lfu_reg.cli.compare.loading.available_bytes", lambda device: 1000)
    done = run(str(SMALL), str(rows), "--out", str(tmp_path / "out"), *QUICK, *FEW)
    assert done.exit_code == 2
    assert "0.0 GB are free. Give a smaller --batch" in done.stderr


def test_missing_extra_is_named() -> None:
    code = (
        "import importlib.util, sys\n"
        "real = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'matplotlib' else real(name, *a)\n"
        "sys.argv = ['lfu-reg', 'compare', 'model', 'data']\n"
        "from lfu_reg.cli import main\nmain()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'lfu_reg[compare]'" in done.stderr


def test_the_base_model_is_left_as_it_was() -> None:
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(SMALL)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    batch = [Tokens((5, 6, 7, 8), 2)]
    was = log_probabilities(base, batch, 0, "cpu")
    with training.adapted(base, seed=0) as model:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        tuned = log_probabilities(model, batch, 0, "cpu")
        with training.scaled(model, 0.0):
            assert divergence(was, log_probabilities(model, batch, 0, "cpu")) == pytest.approx(0.0, abs=1e-6)
        assert divergence(tuned, log_probabilities(model, batch, 0, "cpu")) == 0.0
    expected = (was[0].exp() * (was[0] - tuned[0])).sum(-1).mean()
    assert divergence(was, tuned) == pytest.approx(float(expected), rel=1e-4)
    after = base.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_the_page_names_options_that_exist() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "cli.md").read_text()
    section = page.split("## Whether it helps")[1].split("\n## ")[0]
    named = set(re.findall(r"--[a-z][a-z-]+", section))
    there = {f"--{name.replace('_', '-')}" for name in inspect.signature(command.compare).parameters}
    assert len(named) > 15
    assert named <= there
