"""Which trainings are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from lfu_reg.auxiliaries import AuxiliaryName

EXACT, ONE_BACKWARD = "exact", "one-backward"
COST = {None: 1.0, EXACT: 1.9, ONE_BACKWARD: 1.4}  # steps of SFT, until they have been measured


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        rate: learning rate.
        seed: of the adapter's first values and the order of the rows, the same for all methods.
        strength: of LfU; None is plain SFT.
        step: "exact" or "one-backward"; None is plain SFT.
    """

    rate: float
    seed: int
    strength: float | None = None
    step: str | None = None

    @property
    def setting(self) -> str:
        """What it is called, whatever the seed."""
        if self.step is None:
            return f"SFT, rate {self.rate:g}"
        return f"LfU {self.strength:g}, {self.step}, rate {self.rate:g}"

    @property
    def key(self) -> str:
        """What its row and its folder are called."""
        kind = "sft" if self.step is None else f"lfu-{self.strength:g}-{self.step}"
        return f"{kind}_rate-{self.rate:g}_seed-{self.seed}"

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Run:
        """The run whose row this is."""
        return cls(row["rate"], row["seed"], row["strength"], row["step"])


@dataclass(frozen=True)
class Grid:
    """What is tried.

    Attributes:
        rates: learning rates of SFT.
        lfu_rates: those of LfU; empty is the one at which SFT has the lowest loss on held-out rows.
        strengths: of LfU.
        steps: how LfU's step is taken.
        seeds: number of seeds.
    """

    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    lfu_rates: tuple[float, ...] = ()
    strengths: tuple[float, ...] = (0.3, 1.0, 3.0)
    steps: tuple[str, ...] = (EXACT,)
    seeds: int = 3

    def sft(self) -> list[Run]:
        """Plain SFT's runs, seed by seed, so that an interrupted comparison is balanced."""
        return [Run(rate, seed) for seed, rate in product(range(self.seeds), self.rates)]

    def lfu(self, best_rate: float) -> list[Run]:
        """LfU's runs."""
        parts = product(range(self.seeds), self.steps, self.lfu_rates or (best_rate,), self.strengths)
        return [Run(rate, seed, strength, step) for seed, step, rate, strength in parts]


@dataclass(frozen=True)
class Setting:
    """What one comparison holds fixed; rows of two settings cannot be compared.

    Attributes:
        model: folder or hub name.
        data: file of rows.
        keep: files of what must not be forgotten.
        train: rows to train on, at most.
        held_out: rows to score on, at most.
        steps: of a training.
        batch: rows of a step.
        tokens: of the longest row.
        scales: by which an adapter is multiplied after training, rising to 1.
        auxiliary: LfU's.
        dtype: of the weights.
        device: torch's name.
    """

    model: str
    data: Path
    keep: tuple[Path, ...] = ()
    train: int = 256
    held_out: int = 64
    steps: int = 60
    batch: int = 8
    tokens: int = 256
    scales: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    auxiliary: AuxiliaryName = "lora"
    dtype: str = "float32"
    device: str = "cpu"


def best_rate(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """The learning rate at which SFT's loss on held-out rows, the mean over seeds, is lowest; None if all diverged."""
    losses: dict[float, list[float]] = {}
    for row in rows:
        if row["step"] is None and row["points"]:
            losses.setdefault(row["rate"], []).append(row["points"][-1]["domain"]["loss"])
    return min(losses, key=lambda rate: fmean(losses[rate]), default=None)
