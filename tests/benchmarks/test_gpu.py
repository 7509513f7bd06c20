"""The one command for a GPU, rehearsed on a CPU: every stage, and every way in which a part can fail."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("scipy")

from gpu import __main__ as command
from gpu import page, runner
from gpu.record import DIED, HUNG, OK, WAITING, Record
from gpu.rehearsal import EXPECTED
from gpu.stages import FAILURES, STAGES, Stage
from gpu.verdicts import verdicts
from kernel.page import PAGE as KERNEL_PAGE
from step import page as step_page

BENCHMARKS = Path(command.__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole rehearsal, which ended well."""
    folder = tmp_path_factory.mktemp("gpu")
    line = [sys.executable, "-m", "gpu", "--rehearse", "--minutes", "6", "--out", str(folder)]
    # As on the machine that it is for: nothing but the folder says where the checkout is.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(line, cwd=BENCHMARKS, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_every_part_of_every_stage_runs(rehearsal: Path, stage: Stage) -> None:
    content = json.loads((rehearsal / f"{stage.name}.json").read_text())
    assert {name: part["state"] for name, part in content["parts"].items()} == {p.name: OK for p in stage.parts}
    assert content["rehearsal"]
    assert content["surroundings"]["commit"]


@pytest.mark.slow
def test_every_failure_is_noted_and_what_follows_goes_on(rehearsal: Path) -> None:
    record = Record(rehearsal / "failures.json")
    assert {name: part["state"] for name, part in record.parts.items()} == EXPECTED
    assert set(EXPECTED.values()) == {"failed", "out of memory", "skipped", "hung", "died", "ok"}
    assert "a mistake" in record.parts["raises"]["error"]
    assert "failures.py" in record.parts["raises"]["error"]  # the error in full
    assert "SIGKILL" in record.parts["is killed"]["error"]


@pytest.mark.slow
def test_the_summary_has_verdicts_and_parts(rehearsal: Path) -> None:
    summary = (rehearsal / "summary.md").read_text()
    assert summary.startswith("A rehearsal on a CPU: no figure of it means anything.")
    for verdict in verdicts(page.results(rehearsal)):
        assert f"| {verdict.what} | {verdict.allowed} | {verdict.found} |" in summary
    for stage in (FAILURES, *STAGES):
        for part in stage.parts:
            assert f"| {stage.name} | {part.name} |" in summary


@pytest.mark.slow
def test_the_step_has_every_method(rehearsal: Path) -> None:
    parts = Record(rehearsal / "step.json").parts
    alone = parts["methods"]["result"]["methods"]
    assert {"sft", "steering", "lora", "weights", "lora-one", "lora-late"} <= alone.keys()
    assert {"authors-lora", "authors-steering"} <= alone.keys()
    assert all("ms" in row for row in alone.values()), alone
    interleaved = parts["interleaved"]["result"]
    assert {row["key"] for row in interleaved["rows"]} == alone.keys()
    assert interleaved["clean_states_mb"] == pytest.approx(2 * 2 * 8 * 32 * 2 / 1e6, abs=0.01)
    between = parts["between the passes"]["result"]["methods"]["lora"]
    assert any("regularizer.py" in entry["function"] for entry in between["own_functions"])


@pytest.mark.slow
def test_pages_show_the_files(rehearsal: Path, tmp_path: Path) -> None:
    for name in ("kernel", "step"):
        text = (rehearsal / f"{name}.json").read_text().replace('"provider": "twin"', '"provider": "triton"')
        (tmp_path / f"{name}.json").write_text(text)
    kernel = page.kernel(tmp_path)
    assert "No GPU yet" not in kernel
    assert re.search(
        r"^\| 2x16x64 \| bfloat16 \| 1.0 \| \d+ \| [\d.]+ \| \d+ \| [\d.]+ \| [\d.]+ \(\w+", kernel, re.MULTILINE
    )
    assert "Tiles as shipped: 4096 elements, 4 warps" in kernel
    cost = step_page.on_a_gpu(page.results(tmp_path))
    assert "| LfU LoRA |" in cost
    assert "exact step, steering: time over the floor" in cost
    assert "shape of Llama-3.1-8B" in page.readme(tmp_path)


def test_pages_say_once_that_there_was_no_gpu(tmp_path: Path) -> None:
    if page.results():
        pytest.skip("there are figures from a GPU")
    root = BENCHMARKS.parent
    for file in (KERNEL_PAGE, root / "docs" / "cost.md", root / "README.md"):
        assert file.read_text().count("No GPU yet") == 1, file


def test_a_process_that_cannot_begin_is_started_once(tmp_path: Path) -> None:
    start = time.monotonic()
    record = runner.run_stage(FAILURES, tmp_path / "failures.json", start + 60, ["--no-such-option"], {})
    assert {part["state"] for part in record.parts.values()} == {DIED}
    assert "no-such-option" in record.parts["raises"]["error"]


def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    record = Record.begin(tmp_path / "failures.json", "failures", ["hangs"], rehearsal=True)
    child = [sys.executable, "-m", "gpu.child", "failures", str(record.path), "--rehearse"]
    parent = (
        "import os, subprocess, sys, time; from gpu.record import Record; from pathlib import Path\n"
        f"subprocess.Popen({child!r}, start_new_session=True)\n"
        f"while not Record(Path({str(record.path)!r})).named('running'): time.sleep(0.1)\n"
        "os._exit(1)"
    )
    environment = {**os.environ, "PYTHONPATH": f"{BENCHMARKS.parent}:{BENCHMARKS}"}
    # The child has its parent's output, which ends when the last of both does: an orphan would run into the limit.
    ran = subprocess.run([sys.executable, "-c", parent], env=environment, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 1, ran.stderr


def test_no_time_is_left(tmp_path: Path) -> None:
    record = runner.run_stage(FAILURES, tmp_path / "failures.json", time.monotonic(), [], {})
    assert {part["state"] for part in record.parts.values()} == {WAITING}
    command.summarise(tmp_path)
    assert "| failures | raises | not reached |" in (tmp_path / "summary.md").read_text()


def test_time_runs_out_within_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        "import sys, time; from pathlib import Path; from gpu.record import Record\n"
        "Record(Path(sys.argv[2])).start('raises'); time.sleep(60)"
    )
    (tmp_path / "endless.py").write_text(script)
    popen = subprocess.Popen
    monkeypatch.setattr(
        subprocess,
        "Popen",
        lambda line, **options: popen([line[0], str(tmp_path / "endless.py"), *line[3:]], **options),
    )
    record = runner.run_stage(FAILURES, tmp_path / "failures.json", time.monotonic() + 4, [], {})
    assert record.parts["raises"]["state"] == HUNG
    assert "time is up" in record.parts["raises"]["error"]
    assert record.parts["goes on"]["state"] == WAITING


def test_unknown_stages_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        command.main(["--out", str(tmp_path), "--stages", "smoke,everything"])
    assert "unknown everything; allowed are smoke, kernel, step" in capsys.readouterr().err


def test_a_mistake_in_the_summary_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "step.json").write_text("{")
    command.summarise(tmp_path)
    assert (tmp_path / "summary.md").read_text().startswith("No summary: JSONDecodeError")


def results(*, share: float, torch_only: float, over_floor: float, one_backward: float, peak: float) -> dict[str, Any]:
    def row(provider: str, mode: str, us: float) -> dict[str, Any]:
        return {"provider": provider, "mode": mode, "median_us": us, "share_of_copy": share}

    kernel = [row("triton", mode, 100.0) for mode in ("forward", "backward", "both")]
    kernel += [row("eager", "both", 100 * torch_only), row("stacked", "both", 1000 * torch_only)]
    steps = [{"key": "sft", "peak_mb": 100.0, "ratio": 1.0, "over_floor": 0.5}]
    for key in ("steering", "lora", "weights"):
        steps.append({"key": key, "peak_mb": peak, "ratio": 2.0, "over_floor": over_floor})
        steps.append({"key": f"{key}-one", "peak_mb": peak, "ratio": one_backward, "over_floor": 0.7})
    return {
        "kernel": {"parts": {"headline": {"state": "ok", "result": {"rows": kernel}}}},
        "step": {"parts": {"interleaved": {"state": "ok", "result": {"rows": steps, "clean_states_mb": 20.0}}}},
    }


def test_thresholds_are_reached() -> None:
    found = verdicts(results(share=0.9, torch_only=2.0, over_floor=1.03, one_backward=1.45, peak=130.0))
    assert len(found) == 12
    assert all(verdict.holds for verdict in found)


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({"share": 0.89}, 2),
        ({"torch_only": 1.9}, 1),
        ({"over_floor": 1.04}, 3),
        ({"one_backward": 1.5}, 3),
        ({"peak": 131.0}, 3),
    ],
)
def test_thresholds_are_missed(change: dict[str, float], missed: int) -> None:
    reached = {"share": 0.95, "torch_only": 3.0, "over_floor": 1.0, "one_backward": 1.4, "peak": 100.0}
    assert [v.holds for v in verdicts(results(**{**reached, **change}))].count(False) == missed


def test_nothing_measured_is_open() -> None:
    assert {verdict.holds for verdict in verdicts({})} == {None}
