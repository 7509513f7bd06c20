"""One run: fine-tune, and examine the model at every scale of its adapter."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any

from evidence.finetune import Spec, base_of, fitted, recipe_of
from evidence.measure import ranked
from evidence.robustness import cosines_under_noise
from evidence.tasks import TASKS, choices
from torch import Tensor

from lfu_reg.cli.compare.scoring import divergence, log_probabilities, score
from lfu_reg.cli.compare.training import scaled
from study.cells import ACCURACY, scales
from study.tasks import battery

NOISY = 16  # examples whose hidden states are compared under noise
QUESTIONS = 80  # of PIQA, and of WinoGrande


def figures(spec: Spec) -> dict[str, Any]:
    """Points by scale, and figures of the training."""
    if spec.method == "base":
        model = base_of(TASKS[spec.task].base)[0]
        ranked = {"ranked": accuracies(model, spec)} if spec.experiment == ACCURACY else {}
        return {"points": [point(spec, model, 0.0)], **ranked}
    model, found = fitted(spec, TASKS[spec.task].train(spec.seed), recipe_of(spec))
    model.eval()
    points = []
    for scale in scales(spec):
        with scaled(model, scale) if scale != 1 else nullcontext():
            points.append(point(spec, model, scale))
    if spec.experiment == ACCURACY:
        found["ranked"] = accuracies(model, spec)
    if spec.split == "test" and TASKS[spec.task].base == "text":
        found["cosine"] = cosines_under_noise(model, spec, NOISY)["cosine"]
        found["variations"] = score(model, battery(spec.task, spec.split).variations, **_where(spec))["loss"]
    return {"points": points, **found}


def point(spec: Spec, model: Any, scale: float) -> dict[str, Any]:
    """What one model scores, as `lfu-reg compare` writes it down."""
    on = battery(spec.task, spec.split)
    return {
        "scale": scale,
        "domain": score(model, on.domain, **_where(spec)),
        "kept": {name: score(model, sequences, **_where(spec)) for name, sequences in on.kept.items()},
        "kl": divergence(_of_base(spec.task, spec.split), log_probabilities(model, on.prompts, **_where(spec))),
    }


def accuracies(model: Any, spec: Spec) -> dict[str, float]:
    """Shares of PIQA's and WinoGrande's questions whose right answer is the likelier one, per token."""
    items = choices(QUESTIONS)
    return {name: ranked(model, base_of(TASKS[spec.task].base)[1], items[name]) for name in ("piqa", "winogrande")}


def _where(spec: Spec) -> dict[str, Any]:
    return {"pad": base_of(TASKS[spec.task].base)[1].pad_token_id, "device": "cpu"}


@functools.cache
def _of_base(task: str, split: Any) -> list[Tensor]:
    """The base model's log-probabilities on prompts of the domain."""
    spec = Spec("", task, "base", "", split=split)
    return log_probabilities(base_of(TASKS[task].base)[0], battery(task, split).prompts, **_where(spec))
