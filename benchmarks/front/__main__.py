"""Draws the figure for light and dark pages, and puts it on both first pages with its numbers as text."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html import escape

from evidence.store import RESULTS, ROOT, rows

from front.panels import Bar, Panel, benefit, cost
from front.svg import COLORS, figure

README, HOME = ROOT / "README.md", ROOT / "docs" / "index.md"
FIGURES = ROOT / "docs" / "figures"


def panels() -> list[Panel]:
    """From the result files that there are."""
    step = json.loads(RESULTS.with_name("step_cpu_lora.json").read_text())
    return [cost(step), benefit(rows(), rows(RESULTS.with_name("study.jsonl")))]


def files(shown: Sequence[Panel]) -> dict[str, str]:
    """Names of the pictures, and what is in them."""
    return {f"front-{scheme}.svg": figure(shown, scheme) for scheme in COLORS}


def filled(readme: str, shown: Sequence[Panel]) -> str:
    """The README with the figure between its marks; who cannot see it is read its numbers."""
    markup = (
        "<picture>\n"
        '  <source media="(prefers-color-scheme: dark)" srcset="docs/figures/front-dark.svg">\n'
        f'  <img src="docs/figures/front-light.svg" width="600" alt="{escape(_told(shown))}">\n'
        "</picture>\n\n"
        f"{_caption(shown)} [All figures](docs/evidence.md).\n"
    )
    return _between_marks(readme, markup)


def filled_home(page: str, shown: Sequence[Panel]) -> str:
    """The same for the first page of the site, whose theme chooses by the end of an address."""
    pictures = (f"![{_told(shown)}](figures/front-{scheme}.svg#only-{scheme})\n" for scheme in COLORS)
    return _between_marks(page, f"\n{''.join(pictures)}\n{_caption(shown)}\n\n")


def _told(shown: Sequence[Panel]) -> str:
    return ". ".join(f"{panel.title}. {'; '.join(map(_words, panel.bars))}" for panel in shown)


def _words(bar: Bar) -> str:
    return f"{bar.label}: {bar.value:.2f}" + (f" ({bar.note})" if bar.note else "")


def _caption(shown: Sequence[Panel]) -> str:
    return " ".join(panel.caption for panel in shown if panel.caption)


def _between_marks(page: str, markup: str) -> str:
    return re.sub(r"(<!-- figure -->\n).*?(<!-- /figure -->)", rf"\g<1>{markup}\2", page, flags=re.S)


if __name__ == "__main__":
    drawn = panels()
    for name, picture in files(drawn).items():
        (FIGURES / name).write_text(picture)
    README.write_text(filled(README.read_text(), drawn))
    HOME.write_text(filled_home(HOME.read_text(), drawn))
