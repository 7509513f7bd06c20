"""A history has what each step measured, and the picture shows it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lfu_reg import LfURegularizer, LfUWarning
from lfu_reg.integrations import history as module
from lfu_reg.integrations.history import History
from lfu_reg.integrations.picture import BAND
from tests.support.cases import plain_loss, seeded, token_batch
from tests.support.plain_models import TinyLM
from tests.whole.test_imports import python

STEPS = 6
FAR_TOO_MUCH = {"lam": lambda step: 1e6 if step >= 2 else 1.0, "alpha": 0.1}  # from the third step on


def recorded(history: History, **settings: object) -> list[dict[str, float]]:
    """Record some steps of training, and return the figures as a user would have read them at each."""
    model, read = seeded(TinyLM), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with LfURegularizer(model, **settings) as reg:  # type: ignore[arg-type]
        for seed in range(STEPS):
            reg(model, token_batch(seed), plain_loss).backward()
            optimizer.step()
            optimizer.zero_grad()
            history.record(reg)
            read.append({name: float(value) for name, value in reg.metrics.items()})
    return read


def test_rows_are_what_the_steps_measured() -> None:
    history = History()
    read = recorded(history, every=2)
    rows = [dict(row) for row in history.rows]
    assert [row.pop("step") for row in rows] == list(range(STEPS))
    assert [row.pop("warnings") for row in rows] == [[]] * STEPS
    assert rows == read
    distances = [[name for name in row if name.startswith("distance/")] for row in rows]
    assert [len(names) for names in distances] == [3, 0] * (STEPS // 2)


def test_recording_rarely_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FETCH_EVERY", 4)
    history = History()
    recorded(history)
    assert [isinstance(row["sft_loss"], Tensor) for row in history._rows] == [False] * 4 + [True] * 2
    assert not any(isinstance(value, Tensor) for row in history.rows for value in row.values())


@pytest.mark.filterwarnings("ignore::lfu_reg.LfUWarning")  # a mark is made all the same
def test_a_warning_is_in_the_row_of_its_step_and_once() -> None:
    history = History()
    recorded(history, **FAR_TOO_MUCH)
    assert [row["warnings"] for row in history.rows] == [[], [], ["overwhelming"], [], [], []]


def test_saved_histories_go_on(tmp_path: Path) -> None:
    history = History()
    recorded(history)
    history.save(tmp_path / "lfu.jsonl")
    again = History.load(tmp_path / "lfu.jsonl")
    assert again.rows == history.rows
    recorded(again)
    assert [row["step"] for row in again.rows] == list(range(2 * STEPS))


def test_steps_may_be_numbered_by_the_loop() -> None:
    history, model = History(), seeded(TinyLM)
    with LfURegularizer(model) as reg:
        with pytest.raises(ValueError, match=r"call history.record\(reg\) after loss = reg"):
            history.record(reg)
        reg(model, token_batch(), plain_loss)
        history.record(reg, step=1000)
    assert history.rows[0]["step"] == 1000


def test_the_picture_shows_the_rows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    history = History()
    with pytest.warns(LfUWarning, match="outweighs"):
        recorded(history, **FAR_TOO_MUCH)
    figure = history.plot(tmp_path / "lfu.png")
    assert (tmp_path / "lfu.png").read_bytes().startswith(b"\x89PNG")
    distances, terms, ratio, cosine = figure.axes
    rows = history.rows
    lines = {line.get_label(): [float(y) for y in line.get_ydata()] for line in distances.lines + terms.lines}
    assert lines["blocks.1"] == [row["distance/blocks.1"] for row in rows]
    assert lines["SFT loss"] == [row["sft_loss"] for row in rows]
    assert lines["lam * l_cons"] == [row["lam"] * row["consistency_loss"] for row in rows]
    for panel, name in ((ratio, "gradient_ratio"), (cosine, "gradient_cosine")):
        assert [row[name] for row in rows] in [list(line.get_ydata()) for line in panel.lines]
    for panel in figure.axes:
        assert [list(line.get_xdata()) for line in panel.lines if line.get_linestyle() == ":"] == [[2, 2]]
    assert [text.get_text() for text in distances.texts] == ["overwhelming"]
    lowest, highest = ratio.get_ylim()
    assert lowest < BAND[0] < BAND[1] < highest


def test_a_picture_of_nothing() -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="Nothing was recorded"):
        History().plot()


def test_a_missing_matplotlib_is_named_when_a_picture_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    history = History()
    recorded(history)
    with pytest.raises(ImportError, match=r"pip install 'lfu_reg\[plot\]'"):
        history.plot()


def test_matplotlib_is_imported_for_a_picture_alone() -> None:
    assert "False" in python("import lfu_reg.integrations.history, sys\nprint('matplotlib' in sys.modules)")
