"""The distance to SFT's own curve, by hand."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("scipy")

from lfu_reg.cli.compare.curves import cost, forgotten, gaps, half_width, least_forgotten, sft_curve
from lfu_reg.cli.compare.plan import best_rate
from tests.cli.compare.support import BASE, point, row

# With rate 1 the adapter's line goes from (2, 0) by (1, .1) to (.5, .4); with rate 2 straight to (1, .5).
SFT = [row(1.0, 0, {0.5: (1.0, 0.1), 1.0: (0.5, 0.4)}), row(2.0, 0, {1.0: (1.0, 0.5)})]


def test_sft_may_scale_its_adapter_between_the_scales_that_were_scored() -> None:
    curve = sft_curve(SFT, BASE, seed=0)
    assert least_forgotten(curve, 1.5) == pytest.approx(0.05, abs=0.003)
    assert least_forgotten(curve, 0.75) == pytest.approx(0.25, abs=0.01)
    assert least_forgotten(curve, 0.5) == pytest.approx(0.4)
    assert least_forgotten(curve, 0.3) == pytest.approx(0.4)  # SFT never learns as well: what it forgets at its best
    assert least_forgotten(curve, 2.5) == 0.0  # the base model


def test_gaps_are_taken_seed_by_seed() -> None:
    again = [row(1.0, 1, {0.5: (1.0, 0.2), 1.0: (0.5, 0.4)})]
    lfu = [row(1.0, 0, {0.5: (1.5, 0.0), 1.0: (1.0, 0.04)}, 1.0), row(1.0, 1, {0.5: (1.5, 0.0), 1.0: (1.0, 0.1)}, 1.0)]
    alone = row(1.0, 7, {1.0: (1.0, 0.0)}, 1.0)
    worse = [row(1.0, seed, {1.0: (1.0, 0.3)}, 3.0) for seed in (0, 1)]
    best, other = gaps([*SFT, *again, *lfu, alone, *worse], BASE)
    assert (best.setting, other.setting) == ("LfU 1, exact, rate 1", "LfU 3, exact, rate 1")
    assert best.values == pytest.approx((0.06, 0.1))
    assert best.mean == pytest.approx(0.08)
    # Student's t with one degree of freedom at 1 - .05 / (2 tails * 2 settings), times the standard error .02.
    assert best.margin == pytest.approx(25.4517 * 0.02, rel=1e-4)
    assert other.mean == pytest.approx(-0.15)


def test_one_seed_has_no_interval() -> None:
    (gap,) = gaps([*SFT, row(1.0, 0, {1.0: (1.0, 0.0)}, 1.0)], BASE)
    assert gap.margin == math.inf


def test_intervals_narrow_with_seeds() -> None:
    assert half_width(1.0, 10, 1) == pytest.approx(2.2622 / math.sqrt(10), rel=1e-4)
    assert half_width(1.0, 10, 3) > half_width(1.0, 10, 1) > half_width(1.0, 20, 1)


def test_runs_that_diverged_are_left_out() -> None:
    diverged = {**row(4.0, 0, {1.0: (0.0, 0.0)}), "points": []}
    assert gaps([*SFT, diverged, {**row(1.0, 0, {1.0: (0.0, 0.0)}, 1.0), "points": []}], BASE) == []
    assert best_rate([*SFT, diverged]) == 1.0
    assert best_rate([diverged]) is None


def test_without_files_to_keep_the_divergence_counts() -> None:
    assert forgotten(point(1.0, 0.3), BASE) == pytest.approx(0.3)
    assert forgotten({**point(1.0, 0.3), "kept": {}}, BASE) == 0.1


def test_the_cost_is_taken_step_by_step() -> None:
    lfu = row(1.0, 0, {1.0: (1.0, 0.0)}, 1.0)
    assert cost(lfu, SFT) == pytest.approx(1.9)
    assert math.isnan(cost({**lfu, "seed": 5}, SFT))
