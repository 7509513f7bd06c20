"""The page that shows the whole sweep."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

from demo.methods import BASELINE, METHODS
from demo.sweep_rule import (
    GRIDS,
    LEARNING_RATES,
    PAPER,
    SEEDS,
    Cell,
    Run,
    cell_scores,
    choose_learning_rate,
    choose_setting,
    in_domain_learning_rate,
    neighbourhood_score,
)
from demo.task import TRAIN_SIZE

READING_FILE = Path(__file__).parents[1] / "results" / "demo_sweep_reading.md"
SHOWN = ("in_domain", "variation_mean", "variation_spread", "retention", "final_sft_loss")

INTRODUCTION = """\
# How the demo's settings were chosen

The demo fine-tunes its small embedded model on {train_size} examples of one skill in a new prompt format, once with
correct answers and once with 30 % wrong ones. This sweep shows what alpha and lambda do there. It scores on a
validation split and with seeds ({seeds}) that the demo does not use; the demo reports the test split.

<!-- Written by `python -m demo.sweep` in benchmarks/ from benchmarks/results/demo_sweep.csv; do not edit. -->

The rule:

1. The score of a run is the mean of three accuracies: in-domain, prompt variations, old skills. The score of a cell
   is its mean over both regimes and all seeds.
2. The learning rate is the one at which **plain SFT** has the best score. Every method uses it.
3. Each flavour of LfU takes the cell whose score, averaged with its direct neighbours in the grid, is highest, so
   that one lucky cell is not taken.

Rules 1 and 3 were fixed before the sweep ran. Rule 2 first went by in-domain accuracy alone and took {greedy:g}, where
plain SFT forgets much of the old skills: a weak baseline. It was replaced before any LfU run at the rate that it takes
now. The sweep at {greedy:g} is shown as well, at the end.

The grids were laid out after a look at one other seed, such that lambda * l_cons goes from hardly anything to the
size of the SFT loss; each holds the paper's pair (for relative steering, that of steering).

All numbers are means over {count} seeds, those before the slash with correct answers, those behind it with 30 % wrong
ones; *score* takes both together; *spread* is the standard deviation over six prompt variations;
*SFT loss* is the training loss at the end; *score minus SFT's* is the mean and standard deviation over seeds of the
difference to plain SFT with the same seed. **Bold** marks what was chosen, † the paper's values.
"""


def page(runs: list[Run]) -> str:
    """The whole page as markdown."""
    lr, greedy = choose_learning_rate(runs), in_domain_learning_rate(runs)
    seeds = ", ".join(map(str, SEEDS))
    parts = [
        INTRODUCTION.format(train_size=TRAIN_SIZE, seeds=seeds, count=len(SEEDS), greedy=greedy),
        *(["## Reading\n", READING_FILE.read_text(encoding="utf-8")] if READING_FILE.is_file() else []),
        "## Plain SFT: learning rate\n",
        _table(runs, [Cell(BASELINE, rate) for rate in LEARNING_RATES], Cell(BASELINE, lr), _lr_label),
    ]
    for rate in dict.fromkeys((lr, greedy)):
        for method in GRIDS:
            parts += _grid_section(runs, method, rate, lr)
    return "\n".join(parts)


def _grid_section(runs: list[Run], method: str, rate: float, chosen_rate: float) -> list[str]:
    alphas, lams = GRIDS[method]
    cells = [Cell(method, rate, alpha, lam) for alpha in alphas for lam in lams]
    if not {run.cell for run in runs}.issuperset(cells):
        return []  # not run yet
    best = choose_setting(runs, method, rate)
    title = f"## {METHODS[method].label}, learning rate {rate:g}"
    if rate != chosen_rate:
        title += " (not used; bold is what the rule would take there)"
    return [f"{title}\n", _table(runs, [Cell(BASELINE, rate), *cells], best, _alpha_lam_label)]


def _lr_label(cell: Cell) -> str:
    return f"{cell.lr:g}"


def _alpha_lam_label(cell: Cell) -> str:
    if cell.method == BASELINE:
        return "SFT"
    dagger = " †" if (cell.alpha, cell.lam) == PAPER[cell.method] else ""
    return f"{cell.alpha:g} / {cell.lam:g}{dagger}"


def _table(runs: list[Run], cells: list[Cell], chosen: Cell, label: Callable[[Cell], str]) -> str:
    tuned = chosen.method != BASELINE
    first = "alpha / lambda" if tuned else "learning rate"
    header = [first, "in-domain", "variations", "spread", "old skills", "SFT loss", "score"]
    if tuned:
        header += ["score minus SFT's", "with neighbours"]
    scores = cell_scores([run for run in runs if (run.cell.method, run.cell.lr) == (chosen.method, chosen.lr)])
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for cell in cells:
        of_cell = [run for run in runs if run.cell == cell]
        row = [label(cell), *(_both_regimes(of_cell, name) for name in SHOWN)]
        row.append(f"{statistics.fmean(run.score for run in of_cell):.3f}")
        if tuned and cell.method == BASELINE:
            row += ["", ""]
        elif tuned:
            row += [_minus_sft(runs, of_cell), f"{neighbourhood_score(cell, scores):.3f}"]
        lines.append([f"**{entry}**" if cell == chosen and entry else entry for entry in row])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _both_regimes(runs: list[Run], name: str) -> str:
    """The means with correct and with partly wrong answers."""
    regimes = dict.fromkeys(run.regime for run in runs)
    means = [statistics.fmean(getattr(run, name) for run in runs if run.regime == regime) for regime in regimes]
    return " / ".join(f"{mean:.3f}" for mean in means)


def _minus_sft(runs: list[Run], of_cell: list[Run]) -> str:
    """Mean and standard deviation over seeds of the score's difference to plain fine-tuning with the same seed."""
    lr = of_cell[0].cell.lr
    plain = {(run.regime, run.seed): run.score for run in runs if run.cell == Cell(BASELINE, lr)}
    per_seed = [
        statistics.fmean(run.score - plain[run.regime, seed] for run in of_cell if run.seed == seed)
        for seed in sorted({run.seed for run in of_cell})
    ]
    return f"{statistics.fmean(per_seed):+.3f} ± {statistics.stdev(per_seed):.3f}"
