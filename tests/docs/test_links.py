"""Every link of the documentation, the README and CONTRIBUTING.md leads to a file and an anchor that exist."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("*.md"))]


def text_of(page: Path) -> str:
    """Without code, where brackets are no links and a hash is no heading."""
    text = re.sub(r"^( *)(```|~~~).*?^\1\2", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", lambda code: re.sub(r"[\[\]()#<>]", "", code[0]), text)


def anchors(page: Path) -> set[str]:
    """Of headings, as Python-Markdown makes them, and of names that mkdocstrings documents."""
    found: Counter[str] = Counter()
    names = set(re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE))
    for title in re.findall(r"^#{1,6} (.+)$", text_of(page), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", title)
        plain = unicodedata.normalize("NFKD", plain).encode("ascii", "ignore").decode()
        slug = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())
        names.add(f"{slug}_{found[slug]}" if found[slug] else slug)
        found[slug] += 1
    return names


def links(page: Path) -> list[str]:
    text = text_of(page)
    found = re.findall(r"\]\(\s*<?([^)\s>]+)", text) + re.findall(r"(?:href|src|srcset)=\"([^\"]+)\"", text)
    return [link for link in found if not re.match(r"[a-z]+:", link)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or target.suffix != ".md" or anchor in anchors(target), link


def test_links_are_found() -> None:
    assert sum(len(links(page)) for page in PAGES) > 200
    assert any("#" in link for page in PAGES for link in links(page))
