"""What is run, in order: tuning on validation data, the comparison on test data, and the ablations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from evidence.choice import SKILL_TUNING_TASKS, around, chosen, each
from evidence.control import control, label_at
from evidence.finetune import Spec
from evidence.grids import ENTRIES, PAPER, tuning_specs
from evidence.questions import long, questions, remedies
from evidence.store import Rows
from evidence.verdicts import claims

TUNING_SEEDS = range(100, 101)
# The text tasks take four times as long: they get the methods that the hypotheses are about, and the strongest others.
TEXT_LABELS = [
    "SFT",
    "NEFTune",
    "SAM",
    "EMA",
    "KL to base",
    "L2-SP",
    "LfU LoRA",
    "LfU steering",
    "LfU LoRA, random direction",
    "LfU LoRA, logit KL",
]


def tune_skills(rows: Rows) -> list[Spec]:
    """Nine cells a method, both regimes of label noise together."""
    return tuning_specs(list(ENTRIES), "tune-skills", SKILL_TUNING_TASKS, TUNING_SEEDS)


def tune_text(rows: Rows) -> list[Spec]:
    """Nine cells a method on one of the text tasks."""
    return tuning_specs(TEXT_LABELS, "tune-text", ["gsm8k-64"], TUNING_SEEDS)


def _compare(rows: Rows, name: str, tuning: str, tasks: list[str]) -> list[Spec]:
    best = chosen(rows, tuning)
    cells = [*best.values(), *(replace(p, lr=best["SFT"].lr) for p in PAPER)]
    return each(cells, name, tasks)


def compare_skills(rows: Rows) -> list[Spec]:
    """All methods on scarce, scarcer, plentiful and wrong data."""
    return _compare(rows, "compare-skills", "tune-skills", ["subtract-128", "subtract-128-noisy", "subtract-16"])


def compare_text(rows: Rows) -> list[Spec]:
    """The text tasks; what the hypotheses name comes first."""
    specs = _compare(rows, "compare-text", "tune-text", ["gsm8k-64", "dolly-64"])
    named = {label for claim in claims() for label in (claim.better, claim.worse)}
    return sorted(specs, key=lambda spec: (spec.task != "gsm8k-64", spec.label not in named))


def compare_full(rows: Rows) -> list[Spec]:
    """Full fine-tuning instead of LoRA, at a fourth of the learning rate that was chosen for LoRA."""
    labels = ("SFT", "NEFTune", "LfU LoRA", "LfU steering", "LfU weights", "LfU LoRA, random direction")
    best = chosen(rows, "tune-skills")
    cells = [replace(best[label], tuning="full", lr=best[label].lr / 4) for label in labels]
    return each(cells, "compare-full", SKILL_TUNING_TASKS)


def ablate_lambda(rows: Rows) -> list[Spec]:
    """Lambda over four decades, around the tuned cell."""
    values = (0.005, 0.05, 0.5, 5.0)
    return around(
        rows,
        "lambda",
        {f"{entry}, lambda {w:g}": (entry, {"lam": w}) for entry in ("LfU LoRA", "LfU steering") for w in values},
    )


def ablate_alpha(rows: Rows) -> list[Spec]:
    """Where collapse begins."""
    values = (0.01, 0.03, 0.1, 0.2, 0.5)
    return around(
        rows,
        "alpha",
        {f"{entry}, alpha {a:g}": (entry, {"alpha": a}) for entry in ("LfU LoRA", "LfU steering") for a in values},
    )


def ablate_layers(rows: Rows) -> list[Spec]:
    """Table 5b."""
    return around(
        rows,
        "layers",
        {
            f"{entry}, {part}": (entry, {"layers": part})
            for entry in ("LfU LoRA", "LfU steering")
            for part in ("all", "early", "middle", "late")
        },
    )


def ablate_flavours(rows: Rows) -> list[Spec]:
    """The open questions: norms, steps, distances, reduction, gradient stop, estimators."""
    return around(
        rows,
        "flavours",
        {
            "steering, per-layer norm": ("LfU steering", {"flavour": "per-layer-steering"}),
            "steering at the MLP's output": ("LfU steering", {"layers": r".*\.mlp"}),
            "steering, perturbed detached": ("LfU steering", {"stop_gradient": "perturbed"}),
            "steering, nothing detached": ("LfU steering", {"stop_gradient": "none"}),
            "LoRA, two ascent steps": ("LfU LoRA", {"ascent_steps": 2}),
            "LoRA, cosine": ("LfU LoRA", {"distance": "cosine"}),
            "LoRA, contrastive": ("LfU LoRA", {"distance": "contrastive"}),
            "LoRA, sum over hidden": ("LfU LoRA", {"reduction": "sum"}),
            "LoRA, half of the batch": ("LfU LoRA", {"batch_fraction": 0.5}),
            "LoRA, every second step": ("LfU LoRA", {"every": 2}),
        },
    )


_ROBUSTNESS_LABELS = (
    "SFT",
    "NEFTune",
    "LfU LoRA",
    "LfU steering",
    "LfU weights",
    "LfU LoRA, random direction",
    "LfU LoRA, paper's values",
    "LfU steering, paper's values",
)


def _robustness(rows: Rows, name: str, tasks: list[str]) -> list[Spec]:
    best = chosen(rows, "tune-skills")
    best |= {paper.label: replace(paper, lr=best["SFT"].lr) for paper in PAPER}
    cells = [best[label] for label in _ROBUSTNESS_LABELS]
    # As in `control`: what of a difference is the learning rate's.
    rate = best["LfU LoRA"].lr
    if rate != best["SFT"].lr:
        cells.append(replace(best["SFT"], lr=rate, label=label_at(rate)))
    return each(cells, name, tasks)


def noise(rows: Rows) -> list[Spec]:
    """Hypothesis (d)."""
    return _robustness(rows, "noise", SKILL_TUNING_TASKS)


def refusal(rows: Rows) -> list[Spec]:
    """Table 4's protocol on a toy; the task only names the base model."""
    return _robustness(rows, "refusal", ["subtract-128"])


EXPERIMENTS: dict[str, Callable[[Rows], list[Spec]]] = {
    "tune-skills": tune_skills,
    "compare-skills": compare_skills,
    "control": control,
    "noise": noise,
    "refusal": refusal,
    "tune-text": tune_text,
    "compare-text": compare_text,
    "lambda": ablate_lambda,
    "alpha": ablate_alpha,
    "layers": ablate_layers,
    "flavours": ablate_flavours,
    "compare-full": compare_full,
    "questions": questions,
    "remedies": remedies,
    "long": long,
}
