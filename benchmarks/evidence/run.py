"""Runs the experiments: `make evidence`, or `python -m evidence.run [experiment ...]` in benchmarks/.

Runs that are in the results already are not repeated, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from tqdm import tqdm

from evidence import store
from evidence.experiments import EXPERIMENTS
from evidence.finetune import Spec, run
from evidence.robustness import noise_stability, refusal_under_attack

# What is measured after fine-tuning, where it is not a task's scores.
MEASURES = {"noise": noise_stability, "refusal": refusal_under_attack}


def _work(job: tuple[Spec, str]) -> tuple[Spec, str, dict[str, float]]:
    spec, at = job
    started = time.process_time()
    figures = MEASURES.get(spec.experiment, run)(spec)
    return spec, at, {**figures, "seconds": time.process_time() - started}


def _start(seed: int = 0) -> None:
    torch.set_num_threads(1)


def missing(specs: Iterable[Spec], rows: store.Rows) -> list[Spec]:
    """Those that the rows do not have."""
    done = {store.spec_of(row).key() for row in rows}
    return [spec for spec in specs if spec.key() not in done]


def carry_out(todo: list[Spec], workers: int, title: str, path: Path) -> None:
    """Runs them all, several at a time, each appended to the file as it ends."""
    at_commit = store.commit()
    jobs = [(spec, at_commit) for spec in todo]
    with multiprocessing.get_context("spawn").Pool(workers, initializer=_start) as pool:
        results: Iterable[tuple[Spec, str, dict[str, float]]] = pool.imap_unordered(_work, jobs)
        for spec, at, figures in tqdm(results, total=len(jobs), desc=title, unit="run", dynamic_ncols=True):
            store.append(spec, figures, at, path)


def perform(name: str, workers: int) -> None:
    """Does what is not done yet of one experiment."""
    rows = store.rows()
    carry_out(missing(EXPERIMENTS[name](rows), rows), workers, name, store.RESULTS)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("experiments", nargs="*", metavar="experiment", help=", ".join(EXPERIMENTS))
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    args = parser.parse_args(argv)
    unknown = [name for name in args.experiments if name not in EXPERIMENTS]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(EXPERIMENTS)}")
    for name in args.experiments or EXPERIMENTS:
        perform(name, args.workers)


if __name__ == "__main__":
    main()
