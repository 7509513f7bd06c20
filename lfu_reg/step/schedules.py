"""Hyperparameters that people schedule: a number, or a callable of the step number."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import TypeAlias

Schedule: TypeAlias = float | Callable[[int], float]


def check_schedule(name: str, value: object) -> None:
    """Raise unless `value` is a non-negative finite number or a callable of the step number."""
    if not callable(value):
        check_number(name, value)


def value_at(name: str, schedule: Schedule, step: int) -> float:
    """The value at a step, checked."""
    if not callable(schedule):
        return float(schedule)
    return check_number(f"{name}({step})", schedule(step))


def check_number(name: str, value: object) -> float:
    """`value` as a float.

    Raises:
        TypeError: if it is not a number.
        ValueError: if it is negative, infinite or NaN.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(
            f"{name}={value!r} is a {type(value).__name__}; allowed are numbers from 0 and callables of the step "
            "number."
        )
    if not math.isfinite(value) or value < 0:
        raise ValueError(
            f"{name}={value!r}; allowed are finite numbers from 0, or a callable of the step number that returns one."
        )
    return float(value)
