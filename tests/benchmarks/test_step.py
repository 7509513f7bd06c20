"""The published commands are ones that the command line takes, and the pages can show what they write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from step import __main__ as step
from step import page as step_page
from step.others import OTHERS

from lfu_reg.cli import app as app_module
from lfu_reg.cli.methods import labels


@pytest.mark.parametrize("case", step.COMMANDS)
def test_commands_are_understood(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Reached(Exception):
        pass

    def stop(setting: object) -> None:
        raise Reached

    monkeypatch.setattr(app_module, "check_device", lambda device: None)
    monkeypatch.setattr(app_module, "_counts", stop)
    with pytest.raises(Reached):
        step.overhead(case, tmp_path)


def test_unknown_case() -> None:
    with pytest.raises(SystemExit) as ended:
        step.main(["cpu_everything"])
    assert ended.value.code == 2


def test_a_run_writes_a_result_that_the_page_can_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = "tiny --layers 1 --batch 2 --tokens 8 --rounds 5 --time-budget 1.9 --methods all"
    monkeypatch.setitem(step.COMMANDS, "cpu_lora", tiny)
    step.main(["cpu_lora", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "step_cpu_lora.json").read_text())
    assert {row["key"] for row in result["rows"]} == {*labels(), *OTHERS}
    assert not OTHERS.keys() & labels().keys()  # the command itself does not know them
    page = step_page.section(result, "step_cpu_lora.json")
    assert all(f"| {row['method']} | {row['ms']:.0f} |" in page for row in result["rows"])
    assert all(option["code"] in page for option in result["advice"]["options"])
    assert "| perturbed backward |" in page
    assert "Extrapolated to all 2 layers" in page
    ratio = {row["key"]: f"{row['ratio']:.2f}" for row in result["rows"]}
    of_readme = step_page.readme_figures(result)
    assert f"| exact | {ratio['steering']} | {ratio['lora']} | {ratio['weights']} |" in of_readme
    assert f"| {ratio['steering-one']} | {ratio['lora-one']} | {ratio['weights-one']} |" in of_readme
