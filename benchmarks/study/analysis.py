"""How far every method is from SFT's curve, seed by seed, and what follows for the hypotheses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from evidence.paired import Estimate, estimate
from evidence.store import Rows, spec_of

from lfu_reg.cli.compare.curves import Point, between, least_forgotten, place, sft_curve
from study.cells import ACCURACY, CONTROLS, MAIN, base_of_rows, chosen
from study.tasks import HEADLINE, LARGE, LARGE_OTHERS

WRONG = "study/gsm8k-64-wrong"
Gaps = dict[int, float]


@dataclass(frozen=True)
class Judged:
    """The runs on the test data of one task, and the base model there.

    Attributes:
        rows: of all methods.
        start: the base model's scores.
        rates: that tuning chose, by method.
    """

    rows: Rows
    start: dict[str, Any]
    rates: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: Rows, task: str) -> Judged:
        """Of one task: the seeds of which all of SFT's rates have run."""
        on_test = [row for row in rows if (row["task"], row["split"]) == (task, "test")]
        # The runs for accuracies repeat others.
        mine = [row for row in on_test if row["method"] != "base" and row["experiment"] != ACCURACY]
        sft = {(row["seed"], row["lr"]) for row in mine if row["method"] == "sft"}
        rates = {rate for _, rate in sft}
        whole = [row for row in mine if all((row["seed"], rate) in sft for rate in rates)]
        rates_of = {label: spec.lr for label, spec in chosen(rows, task).items()}
        return cls(whole, base_of_rows(rows, task, "test"), rates_of)

    @property
    def sft(self) -> Rows:
        """SFT at all rates, without labels of other methods."""
        return [row for row in self.rows if row["method"] == "sft"]

    def cells(self) -> list[tuple[str, str, float]]:
        """Label, settings and rate of every cell, in the order of the runs."""
        return list(dict.fromkeys(_cell(row) for row in self.rows))

    def of_cell(self, cell: tuple[str, str, float]) -> Rows:
        """Its rows, one a seed."""
        return [row for row in self.rows if _cell(row) == cell]

    def first(self, label: str) -> Rows:
        """The rows of a method's first cell: the one that tuning chose, on 135 M the one at SFT's rate."""
        found = [cell for cell in self.cells() if cell[0] == label]
        return self.of_cell(found[0]) if found else []

    def tuned(self, label: str) -> Rows:
        """The rows of a method at the strength of its first cell and the rate that tuning chose for it."""
        mine = self.first(label)
        return self.of_cell((*_cell(mine[0])[:2], self.rates.get(label, mine[0]["lr"]))) if mine else []

    @property
    def origin(self) -> Point:
        """Where the base model is: its domain loss, and nothing forgotten."""
        return place(self.start, self.start)

    def curve(self, seed: int, *, by_scale: bool = True) -> list[Point]:
        """Where SFT gets to with one seed, over rates and scales, or over rates alone."""
        if by_scale:
            return sft_curve([{**row, "step": None} for row in self.sft], self.start, seed)
        mine = sorted((row for row in self.sft if row["seed"] == seed), key=lambda row: row["lr"])
        return [self.origin, *between([self.origin, *(place(row["points"][-1], self.start) for row in mine)])]

    def gaps(self, rows: Rows, *, scale: float = 1.0, by_scale: bool = True) -> Gaps:
        """What a method forgets less than SFT's curve where that learns as well, by seed."""
        found = {}
        for row in rows:
            for point in row["points"]:
                if point["scale"] == scale:
                    loss, forgot = place(point, self.start)
                    curve = self.curve(row["seed"], by_scale=by_scale)
                    found[row["seed"]] = least_forgotten(curve, loss) - forgot
        return found

    def places(self, rows: Rows, scale: float = 1.0) -> list[Point]:
        """Domain loss and forgotten of each row."""
        return [place(p, self.start) for row in rows for p in row["points"] if p["scale"] == scale]

    def means(self, rows: Rows, scale: float = 1.0) -> Point:
        """The same as means over the seeds."""
        places = self.places(rows, scale)
        return sum(x for x, _ in places) / len(places), sum(y for _, y in places) / len(places)


def _cell(row: dict[str, Any]) -> tuple[str, str, float]:
    spec = spec_of(row)
    return spec.label, spec.settings, spec.lr


def minus(ours: Gaps, others: Gaps) -> list[float]:
    """Differences on the seeds that both have."""
    return [ours[seed] - others[seed] for seed in sorted(ours.keys() & others.keys())]


@dataclass(frozen=True)
class Answer:
    """What the runs say of a hypothesis.

    Attributes:
        number: as in `hypotheses.md`.
        claim: in words.
        where: the task.
        found: of differences that are positive where the claim is right; None where nothing has run.
    """

    number: str
    claim: str
    where: str
    found: Estimate | None

    @property
    def verdict(self) -> str:
        """supported, contradicted or open."""
        if self.found is None or self.found.count < 2:
            return "not run" if self.found is None else "one seed"
        if abs(self.found.mean) <= self.found.half_width:
            return "open"
        return "supported" if self.found.mean > 0 else "contradicted"


def answers(rows: Rows) -> list[Answer]:
    """Every hypothesis, on every task where it was asked."""
    listed = []
    for task in (HEADLINE, LARGE):
        judged = Judged.of(rows, task)
        kl = judged.gaps(judged.first("KL to base"))
        for ours in ("LfU LoRA", "LfU steering"):
            mine = judged.first(ours)
            gaps = judged.gaps(mine)
            rates = judged.gaps(mine, by_scale=False)
            listed += [
                Answer("1", f"{ours} beyond SFT's rates and scales", task, _known(list(gaps.values()))),
                Answer("2", f"{ours} beyond SFT's rates", task, _known(list(rates.values()))),
                Answer("3", f"{ours} at least KL to base", task, _known(minus(gaps, kl))),
            ]
    listed += _at_own_rates(Judged.of(rows, LARGE))
    for task in LARGE_OTHERS:
        if any(row["task"] == task and row["experiment"] == "135M others" for row in rows):
            judged = Judged.of(rows, task)
            listed += [
                Answer("7", f"{label} beyond SFT's rates and scales", task, _known(list(found.values())))
                for label in MAIN
                if (found := judged.gaps(judged.first(label)))
            ]
    judged = Judged.of(rows, HEADLINE)
    steering = judged.gaps(judged.first("LfU steering"))
    for label in CONTROLS:
        other = judged.gaps(judged.first(label))
        listed.append(Answer("4", f"LfU steering beyond {label}", HEADLINE, _known(minus(steering, other))))
    if any(row["task"] == WRONG and row["experiment"] == "others" for row in rows):
        wrong = Judged.of(rows, WRONG)
        listed += [
            Answer("5", f"{ours} beyond SFT, wrong labels", WRONG, _known(list(wrong.gaps(wrong.first(ours)).values())))
            for ours in ("LfU LoRA", "LfU steering")
        ]
    for ours in ("LfU LoRA", "LfU steering"):
        for claim, of in (
            ("steadier under noise than SFT at its rate", lambda row: row["cosine"]),
            ("better in other wordings than SFT at its rate", lambda row: -row["variations"]),
        ):
            listed.append(Answer("6", f"{ours} {claim}", HEADLINE, _known(at_its_rate(judged, ours, of))))
    return listed


def _at_own_rates(large: Judged) -> list[Answer]:
    """What was asked of 135 M again when every method had a rate of its own."""
    gaps = {label: large.gaps(large.tuned(label)) for label in MAIN}
    first = [
        Answer("1", f"{label}, own rate, beyond SFT's rates and scales", LARGE, _known(list(gaps[label].values())))
        for label in MAIN
    ]
    kl = gaps["KL to base"]
    return first + [
        Answer("3", f"{label}, own rate, at least KL to base at its own", LARGE, _known(minus(gaps[label], kl)))
        for label in MAIN[:2]
    ]


def at_its_rate(judged: Judged, label: str, value: Callable[[dict[str, Any]], float]) -> list[float]:
    """A method's value minus that of SFT at the same rate, by seed."""
    mine = judged.first(label)
    return minus(
        {row["seed"]: value(row) for row in mine},
        {row["seed"]: value(row) for row in judged.sft if mine and row["lr"] == mine[0]["lr"]},
    )


def _known(values: Sequence[float]) -> Estimate | None:
    return estimate(values) if values else None
