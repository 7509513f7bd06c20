"""The comparison in words: whether LfU adds anything beyond SFT's own curve, with which setting, and how surely."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from lfu_reg.cli.compare.curves import Gap, Point, cost, gaps, place
from lfu_reg.cli.compare.plan import Run, best_rate

LITTLE = 0.01  # nats: less is not worth a method

Row = Mapping[str, Any]


def verdict(rows: Sequence[Row], base: Row) -> list[str]:
    """Sentences, the answer first.

    Args:
        rows: of finished runs.
        base: scores of the base model.
    """
    rate = best_rate(rows)
    if rate is None:
        tried = "all of SFT's runs diverged; try lower --rates" if rows else "no run is finished"
        return [f"Nothing can be said: {tried}."]
    start = place(base, base)
    best = mean_place(rows, Run(rate, 0).setting, 1.0, base)
    assert best is not None
    opening = _sft(rows, rate, start, best, base)
    if start[0] - best[0] < LITTLE:
        return [f"Nothing to compare: SFT does not learn here. {opening} Try other --rates, or more --steps."]
    found = gaps(rows, base)
    if not found:
        return [f"Nothing can be said of LfU: none of its runs is finished. {opening}"]
    most_forgotten = max(place(row["points"][-1], base)[1] for row in rows if row["step"] is None and row["points"])
    if most_forgotten < LITTLE:
        answer = "LfU adds nothing here, since SFT forgets next to nothing."
        return [answer, opening, _beside(found[0], rows, base), *_edges(rows, rate)]
    return [_answer(found, rows), opening, _beside(found[0], rows, base), *_edges(rows, rate)]


def mean_place(rows: Sequence[Row], setting: str, scale: float, base: Row) -> Point | None:
    """Where a setting is at a scale of its adapter, the mean over seeds."""
    places = [
        place(point, base)
        for row in rows
        if Run.of(row).setting == setting
        for point in row["points"]
        if point["scale"] == scale
    ]
    return (fmean(x for x, _ in places), fmean(y for _, y in places)) if places else None


def _answer(found: Sequence[Gap], rows: Sequence[Row]) -> str:
    """The answer, as far as the seeds carry it."""
    best, seeds = found[0], len(found[0].values)
    name = best.setting
    if seeds == 1:
        direction = "less" if best.mean > 0 else "more"
        return (
            f"One seed decides nothing. On this one, {name}, is LfU's best setting, and forgets {abs(best.mean):.3f} "
            f"nats {direction} than SFT's own curve where SFT learns as well."
        )
    among = f"{seeds} seeds" + (f", {len(found)} settings looked at" if len(found) > 1 else "")
    interval = f"{abs(best.mean):.3f} ± {best.margin:.3f} nats {'less' if best.mean > 0 else 'more'} ({among})"
    if best.mean > best.margin:
        return (
            f"LfU adds something: {name}, forgets {interval} than SFT at any rate and scale that learns as well, at "
            f"{cost(best.row, rows):.2f} times the cost of a step."
        )
    if all(gap.mean < -gap.margin for gap in found):
        return (
            f"LfU adds nothing: SFT forgets less where it learns as well. LfU's best setting, {name}, forgets "
            f"{interval} than SFT's own curve."
        )
    more = best.seeds_to_tell(len(found))
    advice = f" A difference like this would show with about {more} seeds (--seeds {more})." if more else ""
    return (
        f"No difference that {seeds} seeds can tell: LfU's best setting, {name}, forgets {interval} than SFT's own "
        f"curve.{advice}"
    )


def _sft(rows: Sequence[Row], rate: float, start: Point, best: Point, base: Row) -> str:
    measure = "forgets" if base["kept"] else "moves away from the base model by"
    return (
        f"SFT learns best at rate {rate:g}: its held-out loss goes from {start[0]:.3f} to {best[0]:.3f}, and it "
        f"{measure} {best[1]:.3f} nats."
    )


def _beside(gap: Gap, rows: Sequence[Row], base: Row) -> str:
    """LfU's best setting, and the scored point of SFT that learns as well and forgets least."""
    mine = mean_place(rows, gap.setting, 1.0, base)
    assert mine is not None
    settings = {(Run.of(row).setting, point["scale"]) for row in rows if row["step"] is None for point in row["points"]}
    places = {key: at for key in sorted(settings) if (at := mean_place(rows, *key, base)) and at[0] <= mine[0]}
    own = f"{gap.setting}, ends at {mine[0]:.3f} with {mine[1]:.3f} nats forgotten"
    if not places:
        return f"{own}; no scored point of SFT learns as well."
    (setting, scale), at = min(places.items(), key=lambda item: item[1][1])
    scaled = "" if scale == 1 else f", its adapter times {scale:g} after training (which costs nothing)"
    return f"{own}; {setting}{scaled}, at {at[0]:.3f} with {at[1]:.3f}."


def _edges(rows: Sequence[Row], rate: float) -> list[str]:
    """A best rate at the end of the grid may not be the best."""
    rates = sorted({row["rate"] for row in rows if row["step"] is None})
    if len(rates) > 1 and rate in (rates[0], rates[-1]):
        beyond = "lower" if rate == rates[0] else "higher"
        return [f"The best rate is the {beyond[:-2]}est one tried; add a {beyond} one to --rates."]
    return []
