"""The step benchmark: its opponents compute the same thing, and a tiny run writes what the page needs."""

from __future__ import annotations

import json
from pathlib import Path

import opponents
import pytest
import step
import step_page
import torch
from saved_bytes import SavedBytes

from lfu_reg import LfURegularizer

TINY = ["--layers", "2", "--hidden", "32", "--intermediate", "48", "--heads", "2", "--vocab", "40"]
TINY += ["--batch", "2", "--tokens", "8", "--rounds", "2", "--warmup", "0"]

pytestmark = pytest.mark.filterwarnings("ignore::lfu_reg.LfUWarning")


def test_literal_steering_has_the_gradients_of_lfu() -> None:
    options = step.parse(TINY)
    torch.manual_seed(0)
    model, batch = step.make_model(options), step.make_batch(options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    opponents.three_forwards(model, batch, step.sft_loss).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with LfURegularizer(model, "steering") as reg:
        reg(model, batch, step.sft_loss).backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-6)


def test_a_tiny_run_writes_a_result_that_the_page_can_show(tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    step.main([*TINY, "--out", str(out)])
    result = json.loads(out.read_text())
    assert {row["method"] for row in result["rows"]} >= {"SFT", "LfU LoRA", "authors' LoRA procedure"}
    assert all(row["ms"] > 0 and row["peak_mb"] >= 0 for row in result["rows"])
    page = step_page.section(result, out.name)
    assert all(f"| {row['method']} |" in page for row in result["rows"])


def test_saved_bytes_counts_what_is_kept_once() -> None:
    x = torch.randn(1000, requires_grad=True)
    with SavedBytes() as saved:
        y = x.exp()  # keeps its result
        z = y.sin()  # keeps its argument: the same storage
        assert saved.peak == 4000
        del z, y
    assert saved.now == 0
