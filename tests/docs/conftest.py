"""What the regularizer reports of every regularized step of a page or script, whoever calls it."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from lfu_reg import LfURegularizer
from tests.support.acts import Steps


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    """The figures, a row per call in training mode; the ratio of those alone that were regularized."""
    seen: Steps = []
    call = LfURegularizer.__call__

    def watched(self: LfURegularizer, model: Any, *rest: Any, **named: Any) -> Tensor:
        loss = call(self, model, *rest, **named)
        if model.training:
            names = ("sft_loss", "gradient_ratio") if "ascent_grad_norm" in self.metrics else ("sft_loss",)
            seen.append({name: float(self.metrics[name]) for name in names})
        return loss

    monkeypatch.setattr(LfURegularizer, "__call__", watched)
    return seen
