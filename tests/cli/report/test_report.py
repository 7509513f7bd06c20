"""`lfu-reg report`: everything of a run is on the page, which fetches nothing, and what is no run is told in a line."""

from __future__ import annotations

import base64
import importlib.util
import json
import re
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

from typer.testing import CliRunner

from lfu_reg.cli.app import app
from lfu_reg.cli.compare.means import means_of
from lfu_reg.cli.compare.verdict import verdict
from tests.cli.compare.support import BASE, row

EVIL = '<script src="https://evil.test/x.js"></script>'
SETTING = {"model": "models/smollm", "data": "rows.jsonl", "keep": ["novel.txt"], "train": 48, "scales": [0.5, 1.0]}
ENVIRONMENT = {"date": "2026-11-27", "torch": "2.13.0", "hardware": "a processor"}
RUNS = [
    row(1e-3, 0, {0.5: (1.5, 0.1), 1.0: (1.0, 0.4)}),
    row(1e-3, 0, {0.5: (1.5, 0.05), 1.0: (1.1, 0.1)}, strength=1.0),
]


def folder(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A run as `compare` writes it."""
    path.mkdir()
    base = {"run": "base", "point": BASE, "drawn": [], "questions": [["1 < 2?", "yes & no"]], "samples": [EVIL]}
    (path / "setting.json").write_text(json.dumps({"setting": SETTING, "environment": ENVIRONMENT}))
    (path / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [base, *rows]))
    return path


def report(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


class Tags(HTMLParser):
    """Whether all that is opened is closed, and the places that tags point to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.targets: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.targets += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parsed(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    return tags


def test_everything_is_on_the_page(tmp_path: Path) -> None:
    runs = [{**run, "samples": ["4 > 3"], "warnings": ["odd & <so>"]} for run in RUNS]
    runs[1]["figures"] = {"gradient_ratio": 1.0, "gradient_cosine": 0.43, "lam": 1.09}
    run = folder(tmp_path / "run", runs)
    done = report(run)
    assert done.exit_code == 0, (done.output, done.exception)
    page = (run / "report.html").read_text(encoding="utf-8")
    parsed(page)
    sentences = verdict(runs, BASE)
    assert page.index(escape(sentences[0])) < page.index("<table>")
    means = means_of(runs, BASE)
    cells = re.findall(r"<t[dh][^>]*>([^<]*)</t[dh]>", page)
    for line in means.lines:
        assert set(line) <= set(cells)
    for text in (*sentences, "odd & <so>", "1 < 2?", "yes & no", "4 > 3", "novel.txt", "0.5, 1", "2.13.0", "smollm on"):
        assert escape(text) in page, text
    assert {"0.43", "1.09"} <= set(cells)


def test_the_page_fetches_and_runs_nothing(tmp_path: Path) -> None:
    page_file = tmp_path / "page.html"
    assert report(folder(tmp_path / "run", RUNS), "--out", page_file).exit_code == 0
    page = page_file.read_text()
    tags = parsed(page)
    assert "script" not in tags.seen
    assert "link" not in tags.seen
    (picture,) = tags.targets
    kind, _, data = picture.partition(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(data).startswith(b"\x89PNG")
    assert "url(" not in page
    assert "@import" not in page
    assert "default-src 'none'" in page
    assert escape(EVIL) in page


def test_light_dark_and_phones(tmp_path: Path) -> None:
    run = folder(tmp_path / "run", RUNS)
    report(run)
    page = (run / "report.html").read_text()
    assert "prefers-color-scheme: dark" in page
    assert "img { filter: invert" in page
    assert 'name="viewport"' in page
    assert page.count('<div class="wide"') == page.count("<table>") == 1


def test_a_run_that_was_stopped(tmp_path: Path) -> None:
    run = folder(tmp_path / "run", RUNS[:1])
    with (run / "runs.jsonl").open("a") as file:
        file.write('{"run": "lfu')  # a line that was cut off
    assert report(run).exit_code == 0
    assert "none of its runs is finished" in (run / "report.html").read_text()
    nothing = folder(tmp_path / "nothing", [])
    assert report(nothing).exit_code == 0
    assert "Nothing can be said: no run is finished." in (nothing / "report.html").read_text()


def test_diverged_runs_are_named(tmp_path: Path) -> None:
    run = folder(tmp_path / "run", [*RUNS, row(1.0, 0, {})])
    assert report(run).exit_code == 0
    assert "Diverged, and left out: sft_rate-1_seed-0." in (run / "report.html").read_text()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda run: run.rename(run.with_name("gone")), "there is no such folder. Give the one that"),
        (lambda run: (run / "runs.jsonl").unlink(), "no folder of `lfu-reg compare`: it has no runs.jsonl."),
        (lambda run: (run / "setting.json").write_text("{"), "its files cannot be read (JSONDecodeError"),
        (lambda run: (run / "setting.json").write_text("{}"), "its files cannot be read (KeyError"),
        (lambda run: (run / "runs.jsonl").write_text(""), "nothing is finished there yet"),
        (lambda run: (run / "runs.jsonl").write_text('{"run": "base"}\n'), "was not written by this version"),
    ],
)
def test_what_is_no_run(tmp_path: Path, make: Any, message: str) -> None:
    make(run := folder(tmp_path / "run", RUNS))
    done = report(run)
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.startswith(f"error: RUN {run}: ")
    assert done.stderr.count("\n") == 1


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    done = report(folder(tmp_path / "run", RUNS), "--out", tmp_path / "nowhere" / "page.html")
    assert done.exit_code == 2
    assert "--out" in done.stderr
    assert "no file can be written there" in done.stderr


def test_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "scipy" else real(name, *rest))
    done = report(folder(tmp_path / "run", RUNS))
    assert done.exit_code == 2
    assert "report needs scipy, which is not installed: pip install 'lfu_reg[compare]'" in done.stderr
