"""The distance with weights behind the estimators is the exact one where all weights are equal."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

import torch
from step import estimators, scaling


@pytest.mark.filterwarnings("ignore::lfu_reg.LfUWarning")
@pytest.mark.parametrize("auxiliary", ["steering", "weights"])
def test_equal_weights_and_a_present_direction_are_exact(auxiliary: str) -> None:
    model, batch = estimators.tuned_model(), next(estimators.some_batches())
    kept = (batch["labels"] != -100).flatten()
    even = (kept / (estimators.LAYERS * kept.sum())).expand(estimators.LAYERS, -1)
    exact = estimators.gradient(model, batch, auxiliary, None)
    row = estimators.compared(auxiliary, "even", 1.0, [estimators.gradient(model, batch, auxiliary, even)], exact)
    assert row.bias < 1e-2
    first, alpha = estimators.STALE[auxiliary](), estimators.ALPHA[auxiliary]
    estimators.gradient(model, batch, first, None, alpha=alpha)
    again = estimators.STALE[auxiliary]()
    again.earlier = first.present
    stale = estimators.gradient(model, batch, again, None, alpha=alpha)
    assert estimators.compared(auxiliary, "same batch", 1.0, [stale], exact).bias < 1e-2


def test_bias_and_spread_of_known_estimates() -> None:
    exact = torch.tensor([1.0, 0.0])
    row = estimators.compared("steering", "x", 0.5, [torch.tensor([1.0, 1.0]), torch.tensor([2.0, -1.0])], exact)
    assert row.bias == pytest.approx(0.5)
    assert row.spread == pytest.approx(1.25**0.5)


def test_exponent_of_a_power() -> None:
    points = [{"axis": "batch", "value": v, "ms": 3.0 * v**1.5} for v in (2, 4, 8)]
    assert scaling.exponent("batch", points, lambda p: p["ms"]) == pytest.approx(1.5)
