"""Rows of runs, and a model that takes milliseconds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

SMALL = Path(__file__).resolve().parents[3] / "benchmarks" / "demo" / "model"


def point(loss: float, forgotten: float, scale: float = 1.0) -> dict[str, Any]:
    """A scored model, of a base model that scores `point(2.0, 0.0)`."""
    scores = {"token_accuracy": 0.5, "exact": 0.0}
    return {
        "scale": scale,
        "domain": {"loss": loss, **scores},
        "kept": {"text": {"loss": 3.0 + forgotten, **scores}},
        "kl": 0.1,
    }


BASE = point(2.0, 0.0, scale=0.0)


def row(rate: float, seed: int, points: Mapping[float, tuple[float, float]], strength: float | None = None) -> Any:
    """A finished run whose points are (held-out loss, forgotten) by scale."""
    return {
        "run": f"{rate}-{seed}-{strength}",
        "rate": rate,
        "seed": seed,
        "strength": strength,
        "step": None if strength is None else "exact",
        "points": [point(*at, scale) for scale, at in points.items()],
        "step_seconds": [9.0, 1.0, 1.0] if strength is None else [9.0, 2.0, 1.8],
        "peak_mb": 5.0,
        "samples": [],
        "warnings": [],
    }
