"""Carries out what is missing: `python -m study [stage ...] --minutes 60`; a row a run in results/study.jsonl."""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from evidence import store
from evidence.finetune import Spec
from evidence.run import missing

from lfu_reg.cli.environment import environment
from study.cells import RESULTS, STAGES
from study.runs import figures


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m study", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stages", nargs="*", metavar="stage", help=", ".join(STAGES))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no run begins after so many")
    parser.add_argument("--cells", default="", help="only runs whose key has this text in it, e.g. KL")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if unknown := set(options.stages) - set(STAGES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    end = time.monotonic() + 60 * options.minutes
    for stage in options.stages or STAGES:
        perform(stage, lambda spec: options.cells in spec.key() and time.monotonic() < end)


def perform(stage: str, wanted: Callable[[Spec], bool], path: Path = RESULTS) -> None:
    """One run after another, until none is missing: what tuning chooses is known only when tuning is over."""
    at = {**environment("cpu"), "benchmarks": store.commit(), "command": " ".join(["python -m study", *sys.argv[1:]])}
    while True:
        rows = store.rows(path)
        todo = [spec for spec in missing(STAGES[stage](rows), rows) if wanted(spec)]
        if not todo:
            return
        for spec in todo:
            if wanted(spec):
                started = time.process_time()
                found = figures(spec)
                append(path, {**asdict(spec), **found, "seconds": time.process_time() - started, **at})
                cell = f"{spec.task} {spec.label} {spec.settings} {spec.lr:g} seed {spec.seed}"
                print(f"{time.strftime('%H:%M:%S')} {spec.experiment}: {cell}", flush=True)


def append(path: Path, row: dict[str, Any]) -> None:
    """A row, numbers with five digits."""
    with path.open("a", encoding="utf-8") as file:
        rounded = json.loads(json.dumps(row), parse_float=lambda text: float(f"{float(text):.5g}"))
        file.write(json.dumps(rounded) + "\n")


if __name__ == "__main__":
    main()
