"""How `lfu-reg overhead` measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lfu_reg.cli.errors import Unusable

ROUNDS_TO_RECOMMEND = 5  # with fewer there is no value between a quartile and the extreme


@dataclass(frozen=True)
class Plan:
    """How to measure.

    Attributes:
        keys: methods, SFT among them.
        rounds: that count.
        warmup: rounds before.
        time_budget: allowed ratio to SFT's time, for advice.
        memory_budget: allowed bytes, for advice.

    Raises:
        Unusable: for a budget with fewer rounds than recommended settings need.
    """

    keys: Sequence[str]
    rounds: int = 10
    warmup: int = 2
    time_budget: float | None = None
    memory_budget: float | None = None

    def __post_init__(self) -> None:
        if (self.time_budget or self.memory_budget) and self.rounds < ROUNDS_TO_RECOMMEND:
            raise Unusable(
                f"--rounds {self.rounds}: recommended settings are compared by medians and quartiles, which need at "
                f"least {ROUNDS_TO_RECOMMEND} rounds. Give --rounds {ROUNDS_TO_RECOMMEND} or more, or no budget."
            )

    @property
    def ticks(self) -> int:
        """Steps of the interleaved rounds, for a progress bar."""
        return (self.rounds + self.warmup) * (len(self.keys) + 1)
