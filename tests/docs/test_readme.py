"""The README's and the docs' examples run, and the README's figures are those of the result file."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from lfu_reg.step.attached_model import is_attached
from tests.support.acts import Steps, assert_acts
from tests.support.cases import plain_loss, token_batch
from tests.support.plain_models import TinyLM

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{name}.md" for name in ("index", "choosing-a-strength"))])
@pytest.mark.filterwarnings("ignore::lfu_reg.LfUWarning")
def test_examples_run_and_act(page: str, steps: Steps) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks
    model: nn.Module = TinyLM().train()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    names = {
        "model": model,
        "loader": [token_batch(seed) for seed in range(2)],
        "sft_loss_fn": plain_loss,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
    }
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    assert not all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not is_attached(model)
    assert_acts(steps)


def test_figures_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    page = importlib.import_module("step.page")
    result = json.loads((ROOT / "benchmarks/results/step_cpu_lora.json").read_text())
    assert page.readme_figures(result) in (ROOT / "README.md").read_text()
    written = (ROOT / "docs/cost.md").read_text()
    assert page.section(result, "step_cpu_lora.json") in written
    folder = ROOT / "benchmarks/results"
    results = {path.name: json.loads(path.read_text()) for path in folder.glob("step_cpu_*.json")}
    assert page.aims(results) in written
    authors = importlib.import_module("step.authors")
    assert authors.about(page.section(json.loads((folder / authors.FILE).read_text()), authors.FILE)) in written


def test_the_first_page_has_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("scipy")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    page = (ROOT / "docs/index.md").read_text()
    assert importlib.import_module("home").filled(page) == page
    assert "**Cost:** a step takes" in page
    assert "**Evidence:** at equal loss" in page


def test_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
