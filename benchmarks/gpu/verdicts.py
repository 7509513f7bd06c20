"""The thresholds, and which of them the result files reach."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

OF_COPY, OF_TORCH = 0.90, 2.0  # at least
OVER_FLOOR, ONE_BACKWARD, PEAK = 1.03, 1.45, 1.10  # at most
EXACT = ("steering", "lora", "weights")
OWN = ("triton", "twin")  # the second in a rehearsal

Results = dict[str, dict[str, Any]]  # by stage


@dataclass(frozen=True)
class Verdict:
    """One threshold.

    Attributes:
        what: is held against it.
        allowed: in words.
        found: in words.
        holds: None where there is no figure.
    """

    what: str
    allowed: str
    found: str
    holds: bool | None

    @property
    def word(self) -> str:
        """Of the table."""
        return {True: "yes", False: "**no**", None: "open"}[self.holds]


def verdicts(results: Results) -> list[Verdict]:
    """All of them, with or without a figure."""
    return [*_kernel(results), *_step(results)]


def table(found: list[Verdict]) -> str:
    """In Markdown."""
    lines = [f"| {v.what} | {v.allowed} | {v.found} | {v.word} |" for v in found]
    return "\n".join(["| threshold | allowed | found | holds |", "|---|---|---|---|", *lines, ""])


def part(results: Results, stage: str, *names: str) -> dict[str, Any] | None:
    """What the first of the parts that has ended well says."""
    parts = results.get(stage, {}).get("parts", {})
    return next((parts[n]["result"] for n in names if parts.get(n, {}).get("state") == "ok"), None)


def why_not(results: Results, stage: str, name: str) -> str:
    """The state of a part without a result."""
    state: str = results.get(stage, {}).get("parts", {}).get(name, {}).get("state", "not measured")
    return state


def _kernel(results: Results) -> list[Verdict]:
    where = "kernel at 32 layers, 4 x 512 tokens, 4096, bfloat16"
    headline = part(results, "kernel", "headline")
    us = {(r["provider"], r["mode"]): r for r in (headline or {"rows": []})["rows"]}
    own = next((name for name in OWN if (name, "both") in us), None)
    if own is None:
        missing = why_not(results, "kernel", "headline") if headline is None else "the kernel did not run"
        return [
            Verdict(f"{where}: share of copy bandwidth, {mode}", f">= {OF_COPY:.2f}", missing, None)
            for mode in ("forward", "backward")
        ] + [Verdict(f"{where}: times faster than the best torch-only way", f">= {OF_TORCH:g}", missing, None)]
    found = []
    for mode in ("forward", "backward"):
        share = us[own, mode]["share_of_copy"]
        what = f"{where}: share of copy bandwidth, {mode}"
        found.append(Verdict(what, f">= {OF_COPY:.2f}", f"{share:.2f}", share >= OF_COPY))
    others = {name: r["median_us"] for (name, mode), r in us.items() if mode == "both" and name not in OWN}
    best = min(others, key=lambda name: others[name])
    ratio = others[best] / us[own, "both"]["median_us"]
    what = f"{where}: times faster than the best torch-only way"
    return [*found, Verdict(what, f">= {OF_TORCH:g}", f"{ratio:.2f} ({best})", ratio >= OF_TORCH)]


def _step(results: Results) -> list[Verdict]:
    result = part(results, "step", "interleaved", "exact")
    rows = {} if result is None else {row["key"]: row for row in result["rows"]}
    missing = why_not(results, "step", "exact")
    found = []
    for key in EXACT:
        what, allowed = f"exact step, {key}: time over the floor", f"<= {OVER_FLOOR}"
        ratio = rows[key]["over_floor"] if key in rows else None
        found.append(Verdict(what, allowed, missing if ratio is None else f"{ratio:.3f}", _most(ratio, OVER_FLOOR)))
    alone = (part(results, "step", "methods") or {"methods": {}})["methods"]
    for key in EXACT:
        name = f"{key}-one"
        ratio = rows[name]["ratio"] if name in rows else None
        why = "failed" if name in alone else missing
        what, allowed = f"one backward, {key}: time over SFT's", f"<= {ONE_BACKWARD}"
        found.append(Verdict(what, allowed, why if ratio is None else f"{ratio:.2f}", _most(ratio, ONE_BACKWARD)))
    for key in EXACT:
        ratio = None
        if result is not None and key in rows and rows["sft"]["peak_mb"]:
            ratio = (rows[key]["peak_mb"] - result["clean_states_mb"]) / rows["sft"]["peak_mb"]
        what = f"exact step, {key}: peak memory above the weights, less the clean states, over SFT's"
        found.append(Verdict(what, f"<= {PEAK:.2f}", missing if ratio is None else f"{ratio:.2f}", _most(ratio, PEAK)))
    return found


def _most(value: float | None, allowed: float) -> bool | None:
    return None if value is None else value <= allowed
