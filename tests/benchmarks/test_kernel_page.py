"""No number in docs/kernel.md's tables is typed by hand."""

from __future__ import annotations

from kernel.page import PAGE, filled


def test_the_page_shows_the_result_files() -> None:
    page = PAGE.read_text()
    assert filled(page) == page
