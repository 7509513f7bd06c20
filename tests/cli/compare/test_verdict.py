"""The words are those that the numbers carry."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("scipy")

from lfu_reg.cli.compare.verdict import verdict
from tests.cli.compare.support import BASE, row


def runs(lfu: list[tuple[float, float]], sft: tuple[float, float] = (0.5, 0.4)) -> list[Any]:
    """SFT at three rates, and LfU at one, a seed for each of LfU's places."""
    found = []
    for seed, place in enumerate(lfu):
        half = ((2.0 + sft[0]) / 2, sft[1] / 4)
        found += [row(1.0, seed, {0.5: half, 1.0: sft}), row(0.5, seed, {1.0: half}), row(2.0, seed, {1.0: (0.8, 0.9)})]
        found.append(row(1.0, seed, {1.0: place}, 1.0))
    return found


@pytest.mark.parametrize(
    ("lfu", "answer"),
    [
        ([(0.5, 0.1)], "One seed decides nothing. On this one"),
        ([(0.5, 0.1), (0.5, 0.1001), (0.5, 0.1)], "LfU adds something: LfU 1, exact, rate 1, forgets 0.300"),
        ([(0.5, 0.6), (0.5, 0.6001), (0.5, 0.6)], "LfU adds nothing: SFT forgets less where it learns as well."),
        ([(0.5, 0.1), (0.5, 0.5), (0.5, 0.3)], "No difference that 3 seeds can tell"),
    ],
)
def test_answers(lfu: list[tuple[float, float]], answer: str) -> None:
    lines = verdict(runs(lfu), BASE)
    assert lines[0].startswith(answer)
    assert "its held-out loss goes from 2.000 to 0.500, and it forgets 0.400 nats" in lines[1]


def test_the_cost_is_named_where_it_is_paid() -> None:
    assert "at 1.90 times the cost of a step" in verdict(runs([(0.5, 0.1), (0.5, 0.1001), (0.5, 0.1)]), BASE)[0]


def test_more_seeds_are_asked_for_where_they_would_tell() -> None:
    line = verdict(runs([(0.5, 0.1), (0.5, 0.5), (0.5, 0.2)]), BASE)[0]
    assert "would show with about" in line
    assert "--seeds" in line


def test_the_free_rival_is_named() -> None:
    rows = [row(1.0, 0, {0.5: (1.25, 0.1), 1.0: (0.5, 0.4)}), row(1.0, 0, {1.0: (1.3, 0.2)}, 1.0)]
    lines = verdict(rows, BASE)
    assert "its adapter times 0.5 after training (which costs nothing), at 1.250 with 0.100" in lines[2]


def test_nothing_learnt_nothing_forgotten_nothing_done() -> None:
    still = [row(1.0, 0, {1.0: (1.995, 0.2)}), row(1.0, 0, {1.0: (1.9, 0.0)}, 1.0)]
    assert verdict(still, BASE)[0].startswith("Nothing to compare: SFT does not learn here.")
    kept = [row(1.0, 0, {1.0: (1.0, 0.001)}), row(1.0, 0, {1.0: (1.0, 0.0)}, 1.0)]
    assert verdict(kept, BASE)[0] == "LfU adds nothing here, since SFT forgets next to nothing."
    assert verdict(kept[:1], BASE)[0].startswith("Nothing can be said of LfU")
    assert verdict([], BASE) == ["Nothing can be said: no run is finished."]
    diverged = {**kept[0], "points": []}
    assert "diverged" in verdict([diverged], BASE)[0]


@pytest.mark.parametrize(("best", "advice"), [(0.5, "the lowest one tried; add a lower"), (2.0, "the highest one")])
def test_a_best_rate_at_the_end_of_the_grid(best: float, advice: str) -> None:
    rows = [row(rate, 0, {1.0: (0.5 if rate == best else 1.0, 0.3)}) for rate in (0.5, 1.0, 2.0)]
    lines = verdict([*rows, row(best, 0, {1.0: (0.6, 0.2)}, 1.0)], BASE)
    assert advice in lines[-1]
