"""The rows of a `History` as a picture of four panels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DISTANCE = "distance/"
BAND = (0.1, 10.0)  # of gradient ratios: below nothing is seen, above the model hardly learns
NAMED = 6  # layers in the legend
# Okabe and Ito's, told apart by readers with any kind of colour vision.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"

Rows = Sequence[Mapping[str, Any]]


def draw(rows: Rows) -> Figure:
    """A figure that no window shows; pyplot and its state are left alone.

    Raises:
        ImportError: without matplotlib.
        ValueError: if there are no rows.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("The picture of a history needs matplotlib: pip install 'lfu_reg[plot]'") from error
    if not rows:
        raise ValueError("Nothing was recorded: call history.record(reg) after each step.")
    figure = Figure(figsize=(10, 6.5), layout="constrained", facecolor="white")
    panels = figure.subplots(2, 2, sharex=True)
    _distances(panels[0, 0], rows)
    _terms(panels[0, 1], rows)
    _ratio(panels[1, 0], rows)
    _cosine(panels[1, 1], rows)
    for panel in panels.flat:
        panel.spines[["top", "right"]].set_visible(False)
        for row in rows:
            if row["warnings"]:
                panel.axvline(row["step"], color=RED, linestyle=":", linewidth=1.2)
    _name_warnings(panels[0, 0], rows)
    for panel in panels[1]:
        panel.set_xlabel("step")
    return figure


def _distances(panel: Any, rows: Rows) -> None:
    from matplotlib import colormaps

    names = list(dict.fromkeys(name for row in rows for name in row if name.startswith(DISTANCE)))
    last = max(len(names) - 1, 1)
    named = {round(last * part / (NAMED - 1)) for part in range(NAMED)}
    for place, name in enumerate(names):
        label = ".".join(name.removeprefix(DISTANCE).split(".")[-2:]) if place in named else None
        steps, values = _series(rows, name)
        panel.plot(steps, values, linewidth=1, color=colormaps["viridis"](0.9 * place / last), label=label)
    _finish(panel, "Distance by layer, from the first (dark) to the last", log=True)


def _terms(panel: Any, rows: Rows) -> None:
    panel.plot(*_series(rows, "sft_loss"), color=BLUE, linewidth=1, label="SFT loss")
    regularized = [row for row in rows if row["consistency_loss"]]
    weighted = [row["lam"] * row["consistency_loss"] for row in regularized]
    panel.plot([row["step"] for row in regularized], weighted, color=ORANGE, linewidth=1, label="lam * l_cons")
    _finish(panel, "Terms of the loss", log=True)


def _ratio(panel: Any, rows: Rows) -> None:
    panel.axhspan(*BAND, color=GREEN, alpha=0.12, linewidth=0, label="0.1 to 10")
    panel.plot(*_series(rows, "gradient_ratio"), color=BLUE, linewidth=1, drawstyle="steps-post")
    _finish(panel, "Gradient of lam * l_cons, in lengths of the SFT loss's", log=True)
    lowest, highest = panel.get_ylim()
    panel.set_ylim(min(lowest, BAND[0] / 2), max(highest, BAND[1] * 2))


def _cosine(panel: Any, rows: Rows) -> None:
    panel.axhline(0, color="#999999", linewidth=0.8)
    panel.plot(*_series(rows, "gradient_cosine"), color=BLUE, linewidth=1, drawstyle="steps-post")
    panel.set_ylim(-1, 1)
    _finish(panel, "Cosine between both gradients", log=False)


def _series(rows: Rows, name: str) -> tuple[list[int], list[float]]:
    """Where a figure was there: a step that is plain SFT has no distances."""
    there = [row for row in rows if name in row]
    return [row["step"] for row in there], [row[name] for row in there]


def _finish(panel: Any, title: str, *, log: bool) -> None:
    panel.set_title(title, fontsize=10, loc="left")
    if log:
        panel.set_yscale("log")
    if panel.get_legend_handles_labels()[1]:
        panel.legend(frameon=False, fontsize=8)


def _name_warnings(panel: Any, rows: Rows) -> None:
    for row in rows:
        if row["warnings"]:
            place = {"xycoords": ("data", "axes fraction"), "xytext": (3, -2), "textcoords": "offset points"}
            text = ", ".join(row["warnings"])
            panel.annotate(text, (row["step"], 1), **place, rotation=90, va="top", fontsize=8, color=RED)
