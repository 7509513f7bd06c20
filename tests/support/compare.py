"""Compare gradients and losses, with errors that say which parameter is off and by how much."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

Gradients = Mapping[str, "Tensor | None"]

GRADIENT_TOLERANCE = 1e-9
LOSS_TOLERANCE = 1e-12


def gradients_of(model: nn.Module) -> dict[str, Tensor | None]:
    """.grad of every trainable parameter."""
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def mismatch(actual: Gradients, expected: Gradients) -> tuple[float, str]:
    """The largest relative error of any parameter's gradient, and its name.

    A gradient that is zero but for rounding (attention's key bias) has no relative error worth the name: errors below
    1e-13 of the whole gradient do not count.
    """
    assert actual.keys() == expected.keys()
    floor = 1e-13 * sum(float(g.norm()) ** 2 for g in expected.values() if g is not None) ** 0.5
    worst = (0.0, "none")
    for name, want in expected.items():
        got = actual[name]
        if want is None and got is None:
            continue
        want = torch.zeros_like(got) if want is None else want
        got = torch.zeros_like(want) if got is None else got
        assert torch.isfinite(got).all(), f"gradient of {name} is not finite"
        error = float((got - want).norm())
        if error > floor:
            worst = max(worst, (error / max(float(want.norm()), 1e-300), name))
    return worst


def assert_same_gradients(actual: Gradients, expected: Gradients, tolerance: float = GRADIENT_TOLERANCE) -> None:
    error, name = mismatch(actual, expected)
    assert error <= tolerance, f"gradient of {name} is off by {error:.2e} relative"


def scaled(gradients: Gradients, factor: float) -> dict[str, Tensor | None]:
    return {name: None if g is None else g * factor for name, g in gradients.items()}


def close(got: Any, want: Any, tolerance: float = LOSS_TOLERANCE) -> None:
    got, want = float(got), float(want)
    assert abs(got - want) <= tolerance * max(1.0, abs(want)), (got, want)
