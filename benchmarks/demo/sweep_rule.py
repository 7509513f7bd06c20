"""What the sweep covers, and the rule by which it picks settings; both were fixed before it ran."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from demo.methods import BASELINE

LEARNING_RATES = (1e-3, 2e-3, 4e-3, 8e-3)
# flavour -> (alphas, lambdas): from hardly any effect to lambda * l_cons as large as the SFT loss. The paper's pair is
# in each grid.
GRIDS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "lfu-lora": ((0.001, 0.01, 0.1), (0.05, 0.5, 5.0)),
    "lfu-steering": ((0.1, 0.3, 1.0), (0.1, 1.0, 10.0)),
    "lfu-relative": ((0.01, 0.03, 0.1), (0.01, 0.1, 1.0)),
}
PAPER = {"lfu-lora": (0.1, 5.0), "lfu-steering": (0.1, 0.1), "lfu-relative": (0.1, 0.1)}
LABEL_NOISE = (0.0, 0.3)
SEEDS = (100, 101, 102)  # the demo uses others, and the test split where this uses the validation split


@dataclass(frozen=True)
class Cell:
    """One setting: a method with its learning rate, alpha and lambda."""

    method: str
    lr: float
    alpha: float | None = None
    lam: float | None = None


@dataclass(frozen=True)
class Run:
    """One fine-tuning and its validation scores."""

    cell: Cell
    regime: str
    seed: int
    in_domain: float
    variation_mean: float
    variation_spread: float
    retention: float
    final_sft_loss: float
    seconds: float

    @property
    def score(self) -> float:
        """What the choice goes by: the mean of the three accuracies."""
        return statistics.fmean((self.in_domain, self.variation_mean, self.retention))


COLUMNS = (
    *("method", "lr", "alpha", "lam", "regime", "seed", "in_domain", "variation_mean", "variation_spread"),
    *("retention", "final_sft_loss", "seconds"),
)


def sft_cells() -> list[Cell]:
    """Plain fine-tuning at each learning rate."""
    return [Cell(BASELINE, lr) for lr in LEARNING_RATES]


def lfu_cells(lr: float) -> list[Cell]:
    """Every flavour, alpha and lambda, at one learning rate."""
    return [
        Cell(method, lr, alpha, lam) for method, (alphas, lams) in GRIDS.items() for alpha in alphas for lam in lams
    ]


def cell_scores(runs: list[Run], score: Callable[[Run], float] = lambda run: run.score) -> dict[Cell, float]:
    """The mean over regimes and seeds."""
    of_cell: dict[Cell, list[float]] = defaultdict(list)
    for run in runs:
        of_cell[run.cell].append(score(run))
    return {cell: statistics.fmean(values) for cell, values in of_cell.items()}


def choose_learning_rate(runs: list[Run]) -> float:
    """The learning rate at which plain fine-tuning has the best score."""
    return _best_learning_rate(runs, lambda run: run.score)


def in_domain_learning_rate(runs: list[Run]) -> float:
    """The learning rate at which plain fine-tuning has the best in-domain accuracy, whatever it forgets."""
    return _best_learning_rate(runs, lambda run: run.in_domain)


def _best_learning_rate(runs: list[Run], score: Callable[[Run], float]) -> float:
    scores = cell_scores([run for run in runs if run.cell.method == BASELINE], score)
    return max(scores, key=lambda cell: scores[cell]).lr


def choose_setting(runs: list[Run], method: str, lr: float) -> Cell:
    """The cell with the best score, averaged with its direct neighbours in the grid.

    The neighbours count so that a cell that was lucky once is not taken.
    """
    scores = cell_scores([run for run in runs if (run.cell.method, run.cell.lr) == (method, lr)])
    return max(scores, key=lambda cell: neighbourhood_score(cell, scores))


def neighbourhood_score(cell: Cell, scores: dict[Cell, float]) -> float:
    """The mean score of a cell and of those that differ by one step in alpha or in lambda."""
    alphas, lams = GRIDS[cell.method]
    row, column = alphas.index(cell.alpha), lams.index(cell.lam)
    near = [
        scores[other]
        for other in scores
        if abs(alphas.index(other.alpha) - row) + abs(lams.index(other.lam) - column) <= 1
    ]
    return statistics.fmean(near)
