"""A comparison as a page of HTML that fetches nothing: its style and its picture are in it."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from lfu_reg.cli.compare.means import NOTE, TITLE, means_of
from lfu_reg.cli.compare.plan import Run
from lfu_reg.cli.compare.plot import draw
from lfu_reg.cli.compare.show import shown_runs
from lfu_reg.cli.compare.verdict import verdict
from lfu_reg.cli.report.finished import Finished
from lfu_reg.cli.report.style import STYLE

# What LfU did, of the figures that its runs have: name -> heading.
DID = {
    "gradient_ratio": "gradient, in lengths of SFT's",
    "gradient_cosine": "cosine with SFT's",
    "relative_distance": "states moved by",
    "alpha": "alpha",
    "lam": "lambda",
}
# Of a setting, in the order in which a reader asks.
SETTING = {
    "model": "model",
    "data": "rows",
    "keep": "what is kept",
    "train": "rows to train on, at most",
    "held_out": "rows to score on, at most",
    "steps": "steps",
    "batch": "rows of a step",
    "tokens": "tokens of a row, at most",
    "scales": "scales of an adapter",
    "auxiliary": "auxiliary",
    "dtype": "dtype",
    "device": "device",
    "rows": "digest of the rows",
}


def page(finished: Finished) -> str:
    """The whole page."""
    rows, base, setting = finished.rows, finished.base["point"], finished.setting
    answer, *more = verdict(rows, base)
    title = f"{Path(setting['model']).name} on {Path(setting['data']).name}"
    body = [
        f"<header><p>lfu-reg compare, {escape(finished.environment['date'])}</p><h1>{escape(title)}</h1></header>",
        f'<section class="verdict"><p class="answer">{escape(answer)}</p>{_paragraphs(more)}</section>',
        *(_results(rows, base) if rows else ()),
        "<h2>Warnings</h2>",
        _warnings(rows),
        _answers(finished),
        "<h2>Settings</h2>",
        _pairs({**{heading: setting.get(name) for name, heading in SETTING.items()}, **_tried(rows)}),
        "<h2>Versions</h2>",
        _pairs(finished.environment),
        f"<footer>Made by lfu-reg report from {escape(str(finished.folder / 'runs.jsonl'))}.</footer>",
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        # Whatever is in a model's answers, nothing is fetched and nothing runs.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n"
        "</html>\n"
    )


def _results(rows: Sequence[Mapping[str, Any]], base: Mapping[str, Any]) -> Iterable[str]:
    picture = io.BytesIO()
    draw(rows, base, picture)
    source = base64.b64encode(picture.getvalue()).decode()
    means = means_of(rows, base)
    yield "<h2>Learning against forgetting</h2>"
    yield f'<img alt="What each setting forgets over its loss on held-out rows" src="data:image/png;base64,{source}">'
    yield f"<h2>{TITLE}</h2>{_table(means.columns, means.lines)}<p><small>{escape(NOTE)}</small></p>"
    if lines := _did(rows):
        yield f"<h2>What LfU did</h2>{_table(['', *DID.values()], lines)}"


def _did(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A line per setting of LfU: means of its figures over steps and seeds."""
    found: dict[str, list[Mapping[str, float]]] = {}
    for row in rows:
        if row.get("figures"):
            found.setdefault(Run.of(row).setting, []).append(row["figures"])
    return [
        [setting, *(_mean([one[name] for one in same if name in one]) for name in DID)]
        for setting, same in found.items()
    ]


def _mean(values: Sequence[float]) -> str:
    return f"{fmean(values):.3g}" if values else ""


def _tried(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """What the runs differ in."""
    sft, lfu = [row for row in rows if row["step"] is None], [row for row in rows if row["step"] is not None]
    return {
        "rates of SFT": sorted({row["rate"] for row in sft}),
        "rates of LfU": sorted({row["rate"] for row in lfu}),
        "strengths of LfU": sorted({row["strength"] for row in lfu}),
        "seeds": sorted({row["seed"] for row in rows}),
    }


def _warnings(rows: Sequence[Mapping[str, Any]]) -> str:
    said = sorted({warning for row in rows for warning in row["warnings"]})
    said += [f"Diverged, and left out: {Run.of(row).key}." for row in rows if not row["points"]]
    return _paragraphs(said) or "<p>None.</p>"


def _answers(finished: Finished) -> str:
    """The questions that are shown, with the answers of the data, the base model and one run of each kind."""
    base, shown = finished.base, []
    written = {"base model": base["samples"]}
    written |= {name: row["samples"] for name, row in shown_runs(finished.rows, base["point"]).items()}
    for place, (question, answer) in enumerate(base.get("questions", ())):
        said = {"data": answer, **{name: samples[place] for name, samples in written.items()}}
        shown.append(f'<article><p class="question">{escape(question)}</p>{_definitions(said)}</article>')
    return f"<h2>Answers</h2>{''.join(shown)}" if shown else ""


def _table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Scrolls in a box of its own where the page is narrow."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>\n'
        for name, *cells in lines
    )
    return f'<div class="wide" tabindex="0"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def _pairs(values: Mapping[str, Any]) -> str:
    """Names and what they are; of lists, the items."""

    def text(value: Any) -> str:
        return ", ".join(f"{one:g}" if isinstance(one, float) else str(one) for one in value) or "none"

    return _definitions({name: text(value if isinstance(value, list) else [value]) for name, value in values.items()})


def _definitions(texts: Mapping[str, str]) -> str:
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(text)}</dd>' for name, text in texts.items())}</dl>"


def _paragraphs(texts: Iterable[str]) -> str:
    return "".join(f"<p>{escape(text)}</p>" for text in texts)
