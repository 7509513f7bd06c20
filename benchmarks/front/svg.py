"""Panels of bars as SVG, in colours for a light and for a dark page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from front.panels import LFU, OTHER, SFT, Bar, Panel

COLORS = {
    "light": {"text": "#1f2328", "quiet": "#59636e", SFT: "#8c959f", OTHER: "#e69f00", LFU: "#0072b2"},
    "dark": {"text": "#f0f6fc", "quiet": "#9198a1", SFT: "#6e7681", OTHER: "#e69f00", LFU: "#56b4e9"},
}
FONT = "system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif"
WIDTH, LABELS, BARS = 600, 225, 235  # what is left is for the numbers
TITLE, LINE, GAP = 46, 26, 22


def figure(panels: Sequence[Panel], scheme: str) -> str:
    """The panels, one below the other, so that they can be read on a phone."""
    colors, top, parts = COLORS[scheme], 0, []
    for panel in panels:
        parts += [_text(0, top + 18, panel.title, colors["text"], 16, bold=True)]
        parts += [_text(0, top + 36, panel.subtitle, colors["quiet"], 12)]
        top += TITLE
        unit = BARS / max(bar.value + bar.half_width for bar in panel.bars)
        for bar in panel.bars:
            parts += _bar(bar, top, unit, colors)
            top += LINE
        top += GAP
    height = top - GAP + 4
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'font-family="{FONT}">\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _bar(bar: Bar, top: float, unit: float, colors: dict[str, str]) -> list[str]:
    length, reach = bar.value * unit, (bar.value + bar.half_width) * unit
    middle = top + LINE / 2
    parts = [
        _text(LABELS - 8, middle + 4.5, bar.label, colors["text"], 13, anchor="end"),
        f'<rect x="{LABELS}" y="{top + 4}" width="{length:.1f}" height="{LINE - 8}" rx="2" fill="{colors[bar.kind]}"/>',
    ]
    if bar.half_width:
        start = LABELS + (bar.value - bar.half_width) * unit
        parts.append(
            f'<path d="M{start:.1f} {middle}H{LABELS + reach:.1f}" stroke="{colors["text"]}" stroke-width="1.5"/>'
        )
    words = f"{bar.value:.2f}" + (f", {bar.note}" if bar.note else "")
    return [*parts, _text(LABELS + reach + 6, middle + 4.5, words, colors["text"], 13)]


def _text(x: float, y: float, words: str, color: str, size: int, *, bold: bool = False, anchor: str = "start") -> str:
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{color}" font-size="{size}" text-anchor="{anchor}"{weight}>'
        f"{escape(words)}</text>"
    )
