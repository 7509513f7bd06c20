"""The settings of a regularizer, checked, and the ones among them that people schedule over steps."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from lfu_reg.distances.base import Reduction
from lfu_reg.model.names import one_of, shown
from lfu_reg.model.tokens import TokenMask

Schedule: TypeAlias = float | Callable[[int], float]
StopGradient: TypeAlias = Literal["clean", "perturbed", "none"]
StrategyName: TypeAlias = Literal["auto", "released", "retained", "one-backward"]

BOTH = (
    "lam={lam!r} and strength={strength!r}; allowed is one of them: strength sets lam at each step, such that the "
    "gradient of the consistency term is strength times as long as that of the SFT loss."
)


@dataclass(frozen=True)
class Settings:
    """What the regularizer was asked for; `LfURegularizer` says what each setting means.

    Raises:
        TypeError, ValueError: for a setting that is not allowed, or contradicts another.
    """

    alpha: Schedule | None
    lam: Schedule | None
    strength: Schedule | None = None
    displacement: float = 1e-2
    reduction: Reduction = "mean"
    stop_gradient: StopGradient = "clean"
    token_mask: TokenMask | None = None
    ignore_index: int = -100
    ascent_steps: int = 1
    every: int = 1
    batch_fraction: float = 1.0
    strategy: StrategyName = "auto"
    leave_early: Literal["auto"] | bool = "auto"
    sync_perturbation: bool = False

    def __post_init__(self) -> None:
        """Check them all."""
        for name in ("alpha", "lam", "strength"):
            if (value := getattr(self, name)) is not None and not callable(value):
                check_number(name, value)
        if (self.lam is None) == (self.strength is None):
            raise ValueError(BOTH.format(lam=self.lam, strength=self.strength))
        if not (isinstance(self.displacement, numbers.Real) and 0 < self.displacement < 1):
            raise ValueError(f"displacement={shown(self.displacement)}; allowed are numbers between 0 and 1.")
        words = {
            "reduction": get_args(Reduction),
            "stop_gradient": get_args(StopGradient),
            "strategy": get_args(StrategyName),
            "leave_early": ("auto", True, False),
            "sync_perturbation": (True, False),
        }
        for name, allowed in words.items():
            object.__setattr__(self, name, one_of(name, getattr(self, name), allowed))
        _check_count("ascent_steps", self.ascent_steps)
        _check_count("every", self.every)
        fraction = self.batch_fraction
        if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction <= 1:
            raise ValueError(f"batch_fraction={fraction!r}; allowed are numbers above 0 and up to 1.")
        if isinstance(self.ignore_index, bool) or not isinstance(self.ignore_index, int):
            raise ValueError(f"ignore_index={self.ignore_index!r}; allowed are whole numbers, as in cross_entropy.")
        if self.strategy in ("released", "one-backward") and self.stop_gradient != "clean":
            raise ValueError(
                f"strategy={self.strategy!r} holds the clean hidden states fixed, through which "
                f"stop_gradient={self.stop_gradient!r} sends gradients. Use strategy='auto' or 'retained'."
            )
        if self.is_one_backward and self.ascent_steps > 1:
            raise ValueError(
                f"ascent_steps={self.ascent_steps} takes gradients at points on the way, which "
                "strategy='one-backward' has none of. Use strategy='auto', or ascent_steps=1."
            )
        if self.is_one_backward and self.sync_perturbation:
            raise ValueError(
                "sync_perturbation=True averages the direction inside of the step; with strategy='one-backward' it "
                "comes from earlier backward passes. Use strategy='auto', or sync_perturbation=False."
            )

    @property
    def is_one_backward(self) -> bool:
        """Whether the direction is known before the step."""
        return self.strategy == "one-backward"


def value_at(name: str, schedule: Schedule, step: int) -> float:
    """The value at a step, checked."""
    if not callable(schedule):
        return float(schedule)
    return check_number(f"{name}({step})", schedule(step))


def check_number(name: str, value: object) -> float:
    """`value` as a float."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        given = f"{name}={shown(value)} is a {type(value).__name__}"
        raise TypeError(f"{given}; allowed are numbers from 0 and callables of the step number.")
    if not math.isfinite(value) or value < 0:
        allowed = "finite numbers from 0, or a callable of the step number that returns one"
        raise ValueError(f"{name}={value!r}; allowed are {allowed}.")
    return float(value)


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r}; allowed are whole numbers from 1.")
