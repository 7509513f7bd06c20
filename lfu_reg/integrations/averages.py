"""Figures of the regularizer, averaged between two loggings without waiting for the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

AVERAGED = ("sft_loss", "consistency_loss", "ascent_grad_norm")
LAST = ("gradient_ratio", "gradient_cosine", "relative_distance", "empty_steps", "alpha", "lam")


class Averages:
    """Sums of tensors that stay on their devices until `take`."""

    def __init__(self) -> None:
        self._sums: dict[str, Any] = {}
        self._counts: dict[str, int] = {}
        self._last: dict[str, Any] = {}

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Take note of one step's `LfURegularizer.metrics`; those that are plain SFT count for the SFT loss alone."""
        for name in AVERAGED:
            if name in metrics and (name == "sft_loss" or "ascent_grad_norm" in metrics):
                before = self._sums.get(name)
                self._sums[name] = metrics[name] if before is None else before + metrics[name]
                self._counts[name] = self._counts.get(name, 0) + 1
        self._last.update((name, metrics[name]) for name in LAST if metrics.get(name) is not None)

    def take(self) -> dict[str, float]:
        """The averages since the last call as "lfu/<name>", and the last values of what is no quantity of a step."""
        taken = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        taken.update((name, float(value)) for name, value in self._last.items())
        self._sums, self._counts, self._last = {}, {}, {}
        return {f"lfu/{name}": value for name, value in taken.items()}
