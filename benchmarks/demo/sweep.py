"""The sweep that picked the demo's settings: `python -m demo.sweep` in benchmarks/.

Writes every run to benchmarks/results/demo_sweep.csv and every cell to docs/demo-settings.md. Runs that are in
the CSV already are not repeated, so an interrupted sweep goes on where it stopped; --fresh starts over.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import time
from collections.abc import Iterator
from dataclasses import astuple, replace
from pathlib import Path

import torch

from demo.load import EMBEDDED_MODEL, load_model
from demo.methods import METHODS
from demo.run import Experiment, regime_name
from demo.sweep_page import page
from demo.sweep_rule import (
    COLUMNS,
    LABEL_NOISE,
    SEEDS,
    Cell,
    Run,
    choose_learning_rate,
    in_domain_learning_rate,
    lfu_cells,
    sft_cells,
)
from demo.task import TRAIN_SIZE, skills_task
from demo.train import Recipe

ROOT = Path(__file__).resolve().parents[2]
CSV_FILE = ROOT / "benchmarks" / "results" / "demo_sweep.csv"
PAGE_FILE = ROOT / "docs" / "demo-settings.md"


def read_runs(path: Path = CSV_FILE) -> list[Run]:
    """The runs of a CSV file; none if there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [_run(row) for row in csv.DictReader(file)]


def _run(row: dict[str, str]) -> Run:
    optional = {name: float(row[name]) if row[name] else None for name in ("alpha", "lam")}
    numbers = [float(row[name]) for name in COLUMNS[6:]]
    return Run(Cell(row["method"], float(row["lr"]), **optional), row["regime"], int(row["seed"]), *numbers)


def _append(run: Run, path: Path) -> None:
    new = not path.is_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        values = [*astuple(run.cell), run.regime, run.seed, *astuple(run)[3:]]
        writer.writerow([f"{v:.5g}" if isinstance(v, float) else "" if v is None else v for v in values])


def sweep(cells: list[Cell]) -> None:
    """Runs the cells and appends them to the CSV file."""
    for run in run_cells(cells, read_runs()):
        _append(run, CSV_FILE)


def run_cells(cells: list[Cell], done: list[Run]) -> Iterator[Run]:
    """Runs what is not done yet."""
    finished = {(run.cell, run.regime, run.seed) for run in done}
    model, tokenizer = load_model(str(EMBEDDED_MODEL), torch.device("cpu"), torch.float32)
    task = skills_task(TRAIN_SIZE, eval_size=200, split="validation")
    for cell, noise in itertools.product(cells, LABEL_NOISE):
        method = replace(METHODS[cell.method], alpha=cell.alpha, lam=cell.lam)
        seeds = [seed for seed in SEEDS if (cell, regime_name(noise), seed) not in finished]
        recipe = replace(Recipe(), lr=cell.lr)
        started = time.perf_counter()
        for record in Experiment(model, tokenizer, task, [method], recipe, seeds, [noise]).runs():
            scores = {name: record[name] for name in COLUMNS[6:-1]}
            seconds = time.perf_counter() - started
            yield Run(cell, record["regime"], record["seed"], **scores, seconds=seconds)
            started = time.perf_counter()


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip())
    parser.add_argument("--fresh", action="store_true", help="forget the runs of an earlier sweep")
    parser.add_argument("--page-only", action="store_true", help="only write the page, from the CSV file")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.fresh:
        CSV_FILE.unlink(missing_ok=True)
    if not args.page_only:
        sweep(sft_cells())
        plain = read_runs()
        for lr in dict.fromkeys((choose_learning_rate(plain), in_domain_learning_rate(plain))):
            sweep(lfu_cells(lr))
    PAGE_FILE.write_text(page(read_runs()), encoding="utf-8")
    print(f"Runs: {CSV_FILE}\nPage: {PAGE_FILE}")


if __name__ == "__main__":
    main()
