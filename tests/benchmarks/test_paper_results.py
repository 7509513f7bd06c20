"""The committed runs of reduced size: every table is among them, and the page shows what their logs say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from paper.store import records
from paper.tables import SFT, TABLES, with_sft_grid

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "paper" / "results"
LOGGED = "\n".join(log.read_text(encoding="utf-8") for log in sorted(RESULTS.glob("*.log")))
PAGES = re.split(r"^## ", LOGGED, flags=re.MULTILINE)[1:]


@pytest.mark.parametrize("key", TABLES)
def test_every_row_of_every_table_was_run(key: str) -> None:
    pages = [page for page in PAGES if page.removeprefix("Table ").startswith(f"{key}: ")]
    assert pages
    assert all("**Reduced size" in page for page in pages)
    for row in TABLES[key].rows:
        assert any(f"| {row.label} | {row.setting} | " in page for page in pages), row.label


def test_sft_was_run_at_three_rates_and_three_seeds() -> None:
    rows = [row for row in with_sft_grid(TABLES["1"]).rows if row.method == SFT.method]
    assert len(rows) == 9
    assert any(all(f"| SFT | {row.setting} | " in page for row in rows) for page in PAGES)
    assert "Standard deviation of SFT over 3 seeds" in LOGGED


def test_the_logs_have_a_line_for_every_record() -> None:
    done = records(RESULTS / "smollm2-135m-instruct.jsonl")
    said = re.findall(r"^\d\d:\d\d:\d\d (.+?): ", LOGGED, flags=re.MULTILINE)
    assert sorted(record["label"] for record in done) == sorted(said)
    assert {record["run"]["measured"] for record in done} == {table.measured for table in TABLES.values()}


def test_the_page_shows_rows_of_the_logs() -> None:
    shown = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8").split("\n## What was run\n")[1]
    rows = [line for line in shown.splitlines() if line.startswith("| ") and " / " in line]
    assert rows
    assert all(row in LOGGED.splitlines() for row in rows)
