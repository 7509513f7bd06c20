"""Whether a comparison that was made again says the same as the published one.

Both are means of differences paired by seed: `old` over n_old published seeds with standard deviation s_old, `new` over
n_new fresh ones with s_new. They agree if

    |new - old| <= t * sqrt(s_old^2 / n_old + s_new^2 / n_new)

where t bounds 95 % of Student's distribution with Welch and Satterthwaite's degrees of freedom (so one of twenty
comparisons is expected to disagree even if nothing has changed), and if the verdict does not flip, that is, does not
turn from "supported" into "contradicted" or the reverse.

One fresh seed alone has no spread: s_old then stands for s_new, with n_old - 1 degrees of freedom, and no verdict can
flip. Stored figures have five digits; the bound is at least as wide as that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from evidence.paired import Difference, quantile
from evidence.store import Rows
from evidence.verdicts import Claim, answers

ROUNDING = 2e-5  # two figures of order one, each with five digits
OPPOSITE = {"supported", "contradicted"}


@dataclass(frozen=True)
class Repeated:
    """One claim on one task, published and made again."""

    claim: Claim
    experiment: str
    task: str
    old: Difference
    new: Difference

    @property
    def allowed(self) -> float:
        """How far the new mean may be from the old one."""
        return max(_bound(self.old, self.new), ROUNDING)

    @property
    def verdicts(self) -> tuple[str, str]:
        """The published one, and the one that was found again."""
        again = "one seed" if self.new.count < 2 else self.claim.verdict(self.new)
        return self.claim.verdict(self.old), again

    @property
    def flips(self) -> bool:
        """From supported to contradicted, or back."""
        return set(self.verdicts) == OPPOSITE

    @property
    def agrees(self) -> bool:
        """As this module defines it."""
        return abs(self.new.mean - self.old.mean) <= self.allowed and not self.flips


def _bound(old: Difference, new: Difference) -> float:
    if new.count < 2:
        return quantile(old.count - 1) * old.standard_error * math.sqrt(1 + old.count / new.count)
    variances = [part.standard_error**2 for part in (old, new)]
    total = sum(variances)
    if total == 0:
        return 0.0
    degrees = total**2 / sum(v**2 / (part.count - 1) for v, part in zip(variances, (old, new), strict=True))
    return quantile(degrees) * math.sqrt(total)


def compared(published: Rows, again: Rows, asked: Sequence[Claim]) -> list[Repeated]:
    """Every claim where it is published and was made again."""
    return [
        Repeated(claim, experiment, task, old, new)
        for claim, experiment, task, old in answers(published, asked)
        if (new := claim.on(again, experiment, task, at_least=1)) is not None
    ]
