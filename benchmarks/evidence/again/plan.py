"""What is run again: the cells of the published comparisons that claims rest on, with fresh seeds."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from evidence import corpus
from evidence.finetune import BASES, Spec
from evidence.store import Rows, spec_of
from evidence.tasks import TASKS
from evidence.verdicts import Claim, answers, claims

DEFAULT = ("compare-skills", "compare-text", "noise")
OPTIONAL = ("compare-full",)


def asked(hypotheses: Collection[str], methods: Iterable[str]) -> list[Claim]:
    """The claims of some hypotheses, and for each further method that its score is better than SFT's."""
    more = [Claim("+", "better score than SFT", "score", label, "SFT") for label in methods]
    return [claim for claim in claims() if claim.hypothesis in hypotheses] + more


def planned(published: Rows, listed: Sequence[Claim], experiments: Collection[str], seeds: Iterable[int]) -> list[Spec]:
    """The runs that answer the claims again, with the hyperparameters of the published rows."""
    cells = {(row["experiment"], row["task"], row["label"]): spec_of(row) for row in published}
    wanted = {
        cells[experiment, task, label]: None  # a set that keeps the order
        for claim, experiment, task, _ in answers(published, listed)
        if experiment in experiments
        for label in (claim.better, claim.worse)
    }
    return list(dict.fromkeys(replace(cell, seed=seed) for seed in seeds for cell in wanted))


def left_out(published: Rows, listed: Sequence[Claim], experiments: Iterable[str]) -> list[str]:
    """What cannot be compared, as nothing or not enough of it is published; one line an experiment."""
    told = []
    for experiment in experiments:
        wanted = {
            label: None
            for claim in listed
            if experiment in claim.experiments
            for label in (claim.better, claim.worse)
        }  # fmt: skip
        have = {spec.label for spec in planned(published, listed, [experiment], [0])}
        absent = [label for label in wanted if label not in have]
        if wanted and not have:
            told.append(f"{experiment}: not published yet")
        elif absent:
            told.append(f"{experiment}: without {', '.join(absent)} (not published)")
    return told


def obstacle(experiment: str, published: Rows) -> str | None:
    """Why a published experiment cannot be run here."""
    for base in {TASKS[row["task"]].base for row in published if row["experiment"] == experiment}:
        if not BASES[base].exists():
            return f"{experiment}: its base model, {BASES[base]}, is not there"
        if base == "text" and not corpus.DATA.exists():
            return f"{experiment}: {corpus.NoData(corpus.DATA)}"
    return None


def refused_seeds(published: Rows, seeds: Iterable[int]) -> list[int]:
    """Seeds that are not fresh, those of the tuning among them."""
    return sorted(set(seeds) & {row["seed"] for row in published})
