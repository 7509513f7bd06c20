"""The hyperparameters that are tried: nine cells for every method, so that all are tuned with the same budget."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from evidence.finetune import Spec

LRS = (1e-3, 2e-3, 4e-3)
NINE_LRS = (5e-4, 7e-4, 1e-3, 1.4e-3, 2e-3, 2.8e-3, 4e-3, 5.6e-3, 8e-3)


@dataclass(frozen=True)
class Entry:
    """A method in the comparison.

    Attributes:
        label: its name in the report.
        method: key in `methods.METHODS`.
        settings: three choices of hyperparameters, or one; then nine learning rates are tried.
        dropout: of the adapter, one for each choice, or one for all.
    """

    label: str
    method: str
    settings: tuple[dict[str, Any], ...] = ({},)
    dropout: tuple[float, ...] = (0.0,)

    def cells(self) -> list[Spec]:
        """Nine specs, to be completed by experiment, task, seed and split."""
        choices = list(zip(self.settings, self.dropout * (len(self.settings) // len(self.dropout)), strict=True))
        lrs = LRS if len(choices) == 3 else NINE_LRS
        return [
            Spec("", "", self.method, self.label, json.dumps(settings, sort_keys=True), lr=lr, dropout=dropout)
            for lr in lrs
            for settings, dropout in choices
        ]


def _each(name: str, *values: float, **others: Any) -> tuple[dict[str, Any], ...]:
    return tuple({name: value, **others} for value in values)


def _lfu(flavour: str, *pairs: tuple[float, float], **others: Any) -> tuple[dict[str, Any], ...]:
    return tuple({"flavour": flavour, "alpha": alpha, "lam": lam, **others} for alpha, lam in pairs)


_LORA_PAIRS = ((0.1, 0.05), (0.1, 0.5), (0.01, 0.5))
_STEERING_PAIRS = ((0.1, 0.1), (0.1, 1.0), (0.3, 1.0))

ENTRIES: dict[str, Entry] = {
    entry.label: entry
    for entry in (
        Entry("SFT", "sft"),
        Entry("SFT, dropout", "sft", ({}, {}, {}), (0.05, 0.1, 0.2)),
        Entry("NEFTune", "neftune", _each("noise_alpha", 1.0, 5.0, 15.0)),
        Entry("IM", "im"),
        Entry("GEM", "gem", _each("beta", 0.5, 0.7, 0.9)),
        Entry("SAM", "sam", _each("rho", 0.01, 0.05, 0.2)),
        Entry("feature L1", "feature-l1", _each("lam", 0.001, 0.01, 0.1)),
        Entry("feature L2", "feature-l2", _each("lam", 0.001, 0.01, 0.1)),
        Entry("EMA", "ema", _each("decay", 0.8, 0.9, 0.95)),
        Entry("R-Drop", "r-drop", _each("weight", 0.1, 0.5, 1.0), (0.1,)),
        Entry("KL to base", "kl-to-base", _each("weight", 0.01, 0.1, 1.0)),
        Entry("L2-SP", "l2-sp", _each("weight", 0.001, 0.01, 0.1)),
        Entry("LfU LoRA", "lfu", _lfu("lora", *_LORA_PAIRS)),
        Entry("LfU steering", "lfu", _lfu("steering", *_STEERING_PAIRS)),
        Entry("LfU relative steering", "lfu", _lfu("relative-steering", (0.03, 0.1), (0.1, 0.1), (0.1, 1.0))),
        Entry("LfU weights", "lfu", _lfu("weights", *_LORA_PAIRS)),
        Entry("LfU LoRA, lambda annealed", "lfu", _lfu("lora", *_LORA_PAIRS, anneal=True)),
        Entry("LfU LoRA, random direction", "lfu", _lfu("random", *_LORA_PAIRS)),
        Entry("LfU steering, random direction", "lfu", _lfu("random-steering", *_STEERING_PAIRS)),
        Entry(
            "LfU LoRA, logit KL",
            "logit-kl",
            tuple({"flavour": "lora", "alpha": a, "lam": w} for a, w in _LORA_PAIRS),
        ),
    )
}
# Not tuned: what the paper says, at the learning rate that suits SFT.
PAPER = (
    Spec("", "", "lfu", "LfU LoRA, paper's values", json.dumps({"flavour": "lora", "alpha": 0.1, "lam": 5.0})),
    Spec("", "", "lfu", "LfU steering, paper's values", json.dumps({"flavour": "steering", "alpha": 0.1, "lam": 0.1})),
)


def tuning_specs(labels: list[str], experiment: str, tasks: list[str], seeds: range) -> list[Spec]:
    """Every cell of the entries on validation data."""
    return [
        replace(cell, experiment=experiment, task=task, seed=seed, split="validation")
        for label in labels
        for cell in ENTRIES[label].cells()
        for task in tasks
        for seed in seeds
    ]
