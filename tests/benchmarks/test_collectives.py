"""What a step communicates under FSDP2 is what shapes predict; the page shows both, and no number typed by hand."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from sharded import __main__ as collectives
from sharded import page as collectives_page
from sharded.bytes import STEPS
from sharded.cases import FORECAST, Case

COMMUNICATED = ("all-gather", "reduce-scatter", "all-reduce")
CASES = (
    Case("LoRA", model="tiny", rank=3, dtype="bfloat16", tokens=8),
    Case("full", model="tiny", tuning="full", tokens=8),
)


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return collectives.compared(CASES, ("sft", "steering", "weights", "lora, retained"))


def test_sft_is_what_can_be_computed_by_hand(results: list[dict[str, Any]]) -> None:
    """Two blocks of 4 maps 32 x 32, 3 maps 32 x 48 and 2 norms; two tables 64 x 32 and a norm around them; float32."""
    block, root = 4 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32), 4 * (2 * 64 * 32 + 32)
    counted = results[1]["counted"]["sft"]
    assert counted["all-gather"] == {"number": 2 + 1 + 2, "bytes": 4 * block + root}
    assert counted["reduce-scatter"] == {"number": 2 + 1, "bytes": 2 * block + root}
    assert counted["all-reduce"] == {"number": 0, "bytes": 0}


@pytest.mark.parametrize("case", range(len(CASES)), ids=[case.title for case in CASES])
def test_predicted_is_counted(case: int, results: list[dict[str, Any]]) -> None:
    for step, counted in results[case]["counted"].items():
        predicted = results[case]["predicted"][step]
        assert {k: predicted[k] for k in COMMUNICATED} == {k: counted[k] for k in COMMUNICATED}, step
        if predicted["flops"] is not None:
            assert predicted["flops"] == counted["flops"], step


def test_sizes_of_a_model_that_is_not_built() -> None:
    """70B by hand: rows of LoRA's matrices are padded to the number of ranks, all others are multiples of it."""
    case, (few, many) = FORECAST[0]
    assert (few, many) == (8, 64)
    hidden, inner, kv, vocabulary, layers = 8192, 28672, 1024, 128256, 80
    maps = [(hidden, hidden)] * 2 + [(kv, hidden)] * 2 + [(inner, hidden)] * 2 + [(hidden, inner)]
    frozen = sum(rows * columns for rows, columns in maps) + 2 * hidden
    for ranks in (few, many):
        adapter = sum(ranks * columns + 8 * rows for rows, columns in maps)
        sizes = case.sizes(ranks)
        assert sizes.block_weights == layers * (2 * frozen + 4 * adapter)
        assert sizes.block_gradients == layers * 4 * adapter
        assert sizes.root_weights == 2 * (2 * vocabulary * hidden + hidden)


def test_the_page_shows_predicted_and_counted() -> None:
    result = json.loads((collectives.RESULTS / "collectives.json").read_text())
    page = collectives_page.section(result)
    steps = len(result["cases"]) * len(STEPS)
    assert f"Of all {steps} steps, {steps} have" in page
    wrong = copy.deepcopy(result)
    traffic = wrong["cases"][-1]["counted"]["sft"]["all-gather"]  # of a case that the table leaves out
    traffic["bytes"] *= 2
    assert f"Of all {steps} steps, {steps - 1} have" in collectives_page.section(wrong)
    assert "the largest difference in bytes is 50.0 %" in collectives_page.section(wrong)
    wrong["cases"][0]["counted"]["steering"]["all-gather"] = {"number": 7, "bytes": 1_230_000}
    assert "| 7, 1.23 MB |" in collectives_page.section(wrong)


def test_the_page_is_the_one_in_the_docs() -> None:
    result = json.loads((collectives.RESULTS / "collectives.json").read_text())
    page = Path(__file__).resolve().parents[2] / "docs" / "scaling.md"
    assert page.read_text().endswith(collectives_page.section(result))
