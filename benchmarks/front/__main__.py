"""Draws the figure for light and dark pages, and puts it into the README with its numbers as text."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html import escape

from evidence.store import RESULTS, ROOT, rows

from front.panels import Panel, benefit, cost
from front.svg import COLORS, figure

README = ROOT / "README.md"
FIGURES = ROOT / "docs" / "figures"


def panels() -> list[Panel]:
    """From the result files that there are."""
    step = json.loads(RESULTS.with_name("step_cpu_lora.json").read_text())
    return [cost(step), benefit(rows(), rows(RESULTS.with_name("study.jsonl")))]


def files(shown: Sequence[Panel]) -> dict[str, str]:
    """Names of the pictures, and what is in them."""
    return {f"front-{scheme}.svg": figure(shown, scheme) for scheme in COLORS}


def filled(page: str, shown: Sequence[Panel]) -> str:
    """The README with the figure between its marks; who cannot see it is read its numbers."""
    told = ". ".join(
        f"{panel.title}. "
        + "; ".join(f"{bar.label}: {bar.value:.2f}{f' ({bar.note})' if bar.note else ''}" for bar in panel.bars)
        for panel in shown
    )
    markup = (
        "<picture>\n"
        '  <source media="(prefers-color-scheme: dark)" srcset="docs/figures/front-dark.svg">\n'
        f'  <img src="docs/figures/front-light.svg" width="600" alt="{escape(told)}">\n'
        "</picture>\n\n"
        f"{' '.join(filter(None, (panel.caption for panel in shown)))} [All figures](docs/evidence.md).\n"
    )
    return re.sub(r"(<!-- figure -->\n).*?(<!-- /figure -->)", rf"\g<1>{markup}\2", page, flags=re.S)


if __name__ == "__main__":
    drawn = panels()
    for name, picture in files(drawn).items():
        (FIGURES / name).write_text(picture)
    README.write_text(filled(README.read_text(), drawn))
