"""The comparisons as a table, and as an object for a JSON file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from evidence.again.agreement import Repeated
from evidence.paired import Difference


def table(repeated: Sequence[Repeated]) -> Table:
    """One line a claim and task."""
    shown = Table("", "claim", "task", "published", "verdict", "again", "verdict", "agrees")
    for part in repeated:
        old, new = part.verdicts
        agrees = "[bold red]flips" if part.flips else "yes" if part.agrees else "[yellow]no"
        tuning = ", full tuning" if part.experiment == "compare-full" else ""
        claim = f"{part.claim.better}: {part.claim.text}"
        shown.add_row(
            part.claim.hypothesis, claim, part.task + tuning, _brief(part.old), old, _brief(part.new), new, agrees
        )
    return shown


def _brief(found: Difference) -> str:
    width = "" if found.count < 2 else f" ± {found.half_width:.3f}"
    return f"{found.mean:+.3f}{width}"


def summary(repeated: Sequence[Repeated]) -> str:
    """How many agree."""
    agree, flips = (sum(getattr(part, name) for part in repeated) for name in ("agrees", "flips"))
    return (
        f"{agree} of {len(repeated)} comparisons agree, {flips} flip between supported and contradicted. "
        "Even if nothing has changed, about one of twenty is expected outside of its 95 % interval."
    )


def plain(part: Repeated) -> dict[str, Any]:
    """For JSON; what one seed alone does not tell is null."""
    old, new = part.verdicts
    return {
        "hypothesis": part.claim.hypothesis,
        "claim": part.claim.text,
        "metric": part.claim.metric,
        "better": part.claim.better,
        "worse": part.claim.worse,
        "experiment": part.experiment,
        "task": part.task,
        "published": _plain(part.old, old),
        "again": _plain(part.new, new),
        "allowed": part.allowed,
        "agrees": part.agrees,
        "flips": part.flips,
    }


def _plain(found: Difference, verdict: str) -> dict[str, Any]:
    several = found.count >= 2
    return {
        "mean": found.mean,
        "half_width": found.half_width if several else None,
        "p": found.p if several else None,
        "seeds": found.count,
        "verdict": verdict,
    }
