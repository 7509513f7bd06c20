"""Settings that meet a budget, from the measured phases of the exact step.

Only pass 2 and its backward can be made smaller: on part of the samples, with part of the layers, or at part of the
steps. What each of them does to the gradient is measured in docs/cost.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lfu_reg.cli.methods import LFU, lfu_method, make_method
from lfu_reg.cli.plan import Plan
from lfu_reg.cli.timing import Clock, interleaved, peak_bytes, ratios
from lfu_reg.cli.workloads import Workload, samples_in
from lfu_reg.model.layers import choose_layers

FRACTIONS = (0.75, 0.5, 0.25, 0.125)
EVERY = (2, 3, 4, 8, 16)
EARLY = "another objective: the first third of the layers"
LATE = "another objective: the last third of the layers"
PASS_2 = ("perturbed forward", "distance", "perturbed backward")


@dataclass(frozen=True)
class Option:
    """Settings of LfURegularizer.

    Attributes:
        auxiliary: theta_aux.
        options: other arguments than the defaults.
        ratio: of its time to SFT's, predicted.
        effect: on the gradient of the consistency term.
    """

    auxiliary: str
    options: Mapping[str, Any]
    ratio: float
    effect: str

    @property
    def label(self) -> str:
        """As it is written in code."""
        arguments = [repr(self.auxiliary), *(f"{key}={value!r}" for key, value in self.options.items())]
        return f"LfURegularizer(model, {', '.join(arguments)})"


def options_within(budget: float, auxiliary: str, ratio: float, share_2: float, batch: int) -> list[Option]:
    """Per kind of saving, the option that changes the gradient least among those within the budget.

    Args:
        budget: allowed ratio to SFT's time.
        auxiliary: theta_aux.
        ratio: of the exact step.
        share_2: time of pass 2 and its backward, in units of SFT's.
        batch: samples.

    Returns:
        The exact step alone if it is within the budget; else one option per kind, perhaps none.
    """
    exact = Option(auxiliary, {}, ratio, "exact")
    if ratio <= budget:
        return [exact]
    families = (
        _samples(auxiliary, ratio, share_2, batch),
        *([] if auxiliary == "weights" else [_late(auxiliary, ratio, share_2)]),
        _early(auxiliary, ratio, share_2),
        _steps(auxiliary, ratio),
    )
    found = (next((option for option in family if option.ratio <= budget), None) for family in families)
    return [option for option in found if option is not None]


def recommended(plan: Plan, rows: list[dict[str, Any]], workload: Workload, clock: Clock) -> dict[str, Any] | None:
    """Options within the budgets, each timed against SFT in interleaved rounds of their own; ready for JSON.

    Args:
        plan: the budgets, and the number of rounds.
        rows: measured methods, SFT and those of LfU among them.
        workload: what they train.
        clock: of its device.

    Returns:
        None without a budget.
    """
    if plan.time_budget is None and plan.memory_budget is None:
        return None
    budget = plan.time_budget or float("inf")
    sft = next(row for row in rows if row["key"] == "sft")
    options: list[Option] = []
    too_large = []
    for row in rows:
        if row["key"] not in LFU:
            continue
        if plan.memory_budget is not None and row["with_weights_mb"] * 1e6 > plan.memory_budget:
            too_large.append(row["method"])
            continue
        share_2 = sum(row["phases_ms"][name] for name in PASS_2) / sft["ms"]
        options += options_within(budget, row["key"], row["ratio"], share_2, samples_in(workload.batch))
    base = make_method("sft", workload)
    tried = [
        lfu_method(option.auxiliary, option.label, workload, option.options, key=str(i))
        for i, option in enumerate(options)
    ]
    seconds = interleaved([base, *tried], clock, rounds=plan.rounds, warmup=1) if tried else {}
    measured = {method.key: ratios(seconds[method.key], seconds["sft"]) for method in tried}
    return {
        "over_memory_budget": too_large,
        "options": [
            {
                "code": option.label,
                "predicted_ratio": round(option.ratio, 3),
                "ratio": round(measured[method.key].median, 3),
                "ratio_quartiles": [round(measured[method.key].low, 3), round(measured[method.key].high, 3)],
                "layers": len(choose_layers(workload.model, option.options.get("layers", "all"))),
                "peak_mb": round(peak_bytes(method, clock.device) / 1e6, 2),
                "effect": option.effect,
            }
            for option, method in zip(options, tried, strict=True)
        ],
    }


def _samples(auxiliary: str, ratio: float, share_2: float, batch: int) -> Iterator[Option]:
    for fraction in FRACTIONS:
        number = max(1, round(fraction * batch))
        yield Option(
            auxiliary,
            {"batch_fraction": fraction},
            ratio - (1 - number / batch) * share_2,
            "no bias, more variance: part of the samples",
        )


def _early(auxiliary: str, ratio: float, share_2: float) -> Iterator[Option]:
    yield Option(auxiliary, {"layers": "early"}, ratio - 2 / 3 * share_2, EARLY)


def _late(auxiliary: str, ratio: float, share_2: float) -> Iterator[Option]:
    # What lies below is run once, forward and backward.
    yield Option(auxiliary, {"layers": "late"}, ratio - 2 / 3 * share_2, LATE)


def _steps(auxiliary: str, ratio: float) -> Iterator[Option]:
    for k in EVERY:
        effect = f"the exact gradient at one step in {k}; multiply lam by {k} to keep its weight"
        yield Option(auxiliary, {"every": k}, 1 + (ratio - 1) / k, effect)
