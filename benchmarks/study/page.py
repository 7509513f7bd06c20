"""Writes the study's tables, sentences and figure into the pages: `python -m study.page` in benchmarks/."""

from __future__ import annotations

from functools import partial

from evidence import store
from evidence.store import ROOT, Rows
from strength.page import with_tables

from study import tables, words
from study.cells import RESULTS

PAGES = {name: ROOT / name for name in ("README.md", "docs/evidence.md", "docs/study-data.md")}
FIGURE = ROOT / "docs" / "figures" / "study.png"
TABLES = {
    "study: summary": tables.summary,
    "study: large": tables.large,
    "study: accuracy": tables.accuracy,
    "study: hypotheses": tables.hypotheses,
    "study: places": tables.places,
    "study: parts": tables.parts,
    "study: tuned": tables.tuned,
    "study: provenance": words.provenance,
    "study: readme": words.readme,
    "study: regimes": words.regimes,
    "study: others": words.others,
}


def filled(text: str, rows: Rows) -> str:
    """A page with all tables that it has marks for made anew."""
    wanted = {name: make for name, make in TABLES.items() if f"<!-- {name} -->" in text}
    return with_tables(text, {name: partial(make, rows) for name, make in wanted.items()})


def main() -> None:
    """Pages and figure."""
    from study.figure import draw

    rows = store.rows(RESULTS)
    for page in PAGES.values():
        page.write_text(filled(page.read_text(encoding="utf-8"), rows), encoding="utf-8")
    draw(rows, FIGURE)


if __name__ == "__main__":
    main()
