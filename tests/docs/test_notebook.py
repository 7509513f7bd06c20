"""The notebook's code cells run in order, in one namespace, and LfU acts in it.

No Jupyter is needed for that: the cells are plain Python. Only the number of steps is smaller, to save half a minute.
"""

from __future__ import annotations

import json

import pytest

from tests.docs.examples import EXAMPLES, missing_packages
from tests.support.acts import Steps, assert_acts

NOTEBOOK = EXAMPLES / "lfu_in_ten_minutes.ipynb"
CELLS = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def test_notebook_runs_and_acts(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = ["".join(cell["source"]) for cell in CELLS]
    if missing := missing_packages(codes[0]):
        pytest.skip(f"needs {', '.join(missing)}")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    lines: list[int] = []
    monkeypatch.setattr(pyplot, "show", lambda: (lines.append(len(pyplot.gca().lines)), pyplot.close()))
    monkeypatch.chdir(EXAMPLES)
    names: dict[str, object] = {"__name__": "__main__"}
    for code in codes:
        assert code.count("steps=24") == code.count("def train(")
        exec(compile(code.replace("steps=24", "steps=6"), str(NOTEBOOK), "exec"), names)
    regularized = [step for step in steps if "gradient_ratio" in step]
    assert len(regularized) == len(steps) / 2 == 12
    assert_acts(regularized)
    assert lines == [2, 4]  # the ratios of both runs with LfU, and what all four learn and forget


def test_notebook_is_stored_as_it_ran() -> None:
    """From the first cell to the last, without an error, with both pictures."""
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))
    outputs = [output for cell in CELLS for output in cell["outputs"]]
    assert not any(output["output_type"] == "error" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
