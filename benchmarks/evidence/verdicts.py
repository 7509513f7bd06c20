"""The hypotheses of hypotheses.md, answered by the rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evidence.paired import Difference, paired
from evidence.store import Rows

LFU = ("LfU LoRA", "LfU steering")
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Claim:
    """One inequality between two methods.

    Attributes:
        hypothesis: its letter.
        text: what is claimed.
        metric: column of the results.
        better: label of the method that is claimed to be better.
        worse: label of the other.
        sign: +1 where a higher figure is better.
        experiments: where it is looked for.
        or_equal: whether equality is claimed as well, so that only the contrary contradicts it.
    """

    hypothesis: str
    text: str
    metric: str
    better: str
    worse: str
    sign: int = 1
    experiments: tuple[str, ...] = ("compare-skills", "compare-text", "compare-full")
    or_equal: bool = False

    def on(self, rows: Rows, experiment: str, task: str, at_least: int = 2) -> Difference | None:
        """better - worse, signed so that positive supports the claim; None where fewer seeds than that were run."""
        here = [row for row in rows if (row["experiment"], row["task"]) == (experiment, task) and self.metric in row]
        better, worse = ([row for row in here if row["label"] == label] for label in (self.better, self.worse))
        return paired(better, worse, self.metric, sign=self.sign, at_least=at_least)

    def verdict(self, found: Difference) -> str:
        """supported, contradicted or open."""
        if found.p < SIGNIFICANT and found.mean != 0:
            return "supported" if found.mean > 0 else "contradicted"
        return "not contradicted" if self.or_equal else "open"


def claims() -> list[Claim]:
    """Every hypothesis for both flavours of the paper."""
    listed = []
    for ours in LFU:
        random = f"{ours}, random direction"
        listed += [
            Claim("a", "in-domain at least that of SFT", "in_domain", ours, "SFT", or_equal=True),
            Claim("b", "forgets less than SFT", "retention", ours, "SFT"),
            Claim("b", "forgets less than NEFTune", "retention", ours, "NEFTune"),
            Claim("c", "smaller spread over prompt variations than SFT", "variation_spread", ours, "SFT", sign=-1),
            Claim("d", "hidden states steadier under noise than SFT's", "cosine", ours, "SFT", experiments=("noise",)),
            Claim("e", "gradient's direction beats a random one", "score", ours, random),
        ]
    listed.append(Claim("f", "representations beat logits", "score", "LfU LoRA", "LfU LoRA, logit KL"))
    return listed


def answers(rows: Rows, asked: Sequence[Claim] | None = None) -> list[tuple[Claim, str, str, Difference]]:
    """Every claim on every task where both methods were run: (claim, experiment, task, difference)."""
    places = list(dict.fromkeys((row["experiment"], row["task"]) for row in rows))
    return [
        (claim, experiment, task, found)
        for claim in (claims() if asked is None else asked)
        for experiment, task in places
        if experiment in claim.experiments and (found := claim.on(rows, experiment, task)) is not None
    ]
