"""The eleven tasks in their four categories, under the names that lm-evaluation-harness has for them.

The paper names the tasks alone. Ours are: for TruthfulQA its multiple-choice form with several right answers (mc2), for
ARC the mean of the easy and the challenge part, and the number of examples in the prompt that the harness has.
"""

from __future__ import annotations

from typing import Any

CATEGORIES: dict[str, tuple[str, ...]] = {
    "math": ("gsm8k", "mathqa", "asdiv"),
    "knowledge": ("mmlu", "piqa", "hellaswag", "lambada"),
    "reasoning": ("arc", "coqa"),
    "helpfulness": ("toxigen", "truthfulqa"),
}
# A task of the paper -> tasks of the harness, whose mean counts.
HARNESS: dict[str, tuple[str, ...]] = {
    "gsm8k": ("gsm8k",),
    "mathqa": ("mathqa",),
    "asdiv": ("asdiv",),
    "mmlu": ("mmlu",),
    "piqa": ("piqa",),
    "hellaswag": ("hellaswag",),
    "lambada": ("lambada_openai",),
    "arc": ("arc_easy", "arc_challenge"),
    "coqa": ("coqa",),
    "toxigen": ("toxigen",),
    "truthfulqa": ("truthfulqa_mc2",),
}
ELEVEN = tuple(name for members in CATEGORIES.values() for name in members)
# Questions in the harness's own data, and tokens that one takes (prompt, answers, examples in the prompt), roughly.
SIZES: dict[str, tuple[int, int]] = {
    "gsm8k": (1319, 1200),
    "mathqa": (2985, 350),
    "asdiv": (2305, 60),
    "mmlu": (14042, 130),
    "piqa": (1838, 80),
    "hellaswag": (10042, 360),
    "lambada": (5153, 90),
    "arc": (3548, 160),
    "coqa": (500, 500),
    "toxigen": (940, 80),
    "truthfulqa": (817, 1300),
}
# The figure of a result that counts, the first one that there is: GSM8K's last number, CoQA's overlap, accuracy with
# length normalisation, accuracy.
_FIGURES = ("exact_match,flexible-extract", "f1,none", "acc_norm,none", "acc,none")


def checked(names: list[str] | None) -> list[str]:
    """Names of tasks; None for the eleven.

    Raises:
        ValueError: for names that are not among the eleven.
    """
    unknown = [name for name in names or () if name not in HARNESS]
    if unknown:
        raise ValueError(f"unknown tasks {', '.join(unknown)}; there are {', '.join(ELEVEN)}.")
    return list(names or ELEVEN)


def main_figure(result: dict[str, Any]) -> float:
    """The figure of one of the harness's tasks that counts, in percent."""
    for name in _FIGURES:
        if name in result:
            return 100 * float(result[name])
    raise KeyError(f"none of the figures {', '.join(_FIGURES)} in {sorted(result)}")


def by_category(figures: dict[str, float]) -> dict[str, float]:
    """Category -> mean over those of its tasks that were measured."""
    means = {}
    for category, members in CATEGORIES.items():
        present = [figures[name] for name in members if name in figures]
        if present:
            means[category] = sum(present) / len(present)
    return means
