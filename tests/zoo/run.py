"""Run the whole zoo, or what is missing of it: `python -m tests.zoo.run [task ...]`; results go to results.csv."""

from __future__ import annotations

import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers as tf

from tests.zoo import results
from tests.zoo.examine import Findings, examine
from tests.zoo.species import MAPPINGS, Species, catalogue

LIMIT = 120  # seconds per species


def examined(species: Species, limit: int = LIMIT) -> Findings:
    """`examine`, given up after `limit` seconds."""

    def give_up(*_: Any) -> None:
        raise TimeoutError(f"took more than {limit} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(limit)
    try:
        return examine(species)
    except TimeoutError as error:
        return Findings(species.task, species.model_type, species.class_name, outcome="failed", remarks=[str(error)])
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def main(tasks: list[str], file: Path = results.FILE) -> None:
    """Examine every species of the tasks that has no row yet."""
    warnings.filterwarnings("ignore")
    tf.logging.set_verbosity(tf.logging.CRITICAL)
    torch.set_num_threads(1)
    known = {(row["task"], row["model_type"]) for row in results.read(file)}
    for species in catalogue(*tasks):
        if (species.task, species.model_type) not in known:
            findings = examined(species)
            results.append(findings.row(), file)
            sys.stdout.write(f"{species.task:15} {species.model_type:28} {findings.outcome:10} {findings.seconds}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    unknown = set(sys.argv[1:]) - set(MAPPINGS)
    if unknown:
        sys.exit(f"unknown task {', '.join(sorted(unknown))}; there are {', '.join(MAPPINGS)}")
    main(sys.argv[1:])
