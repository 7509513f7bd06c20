"""What is asked besides the hypotheses: see the second part of hypotheses.md."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from evidence.choice import around, chosen, each
from evidence.finetune import Spec
from evidence.store import Rows


def questions(rows: Rows) -> list[Spec]:
    """Which batch the direction comes from, and which positions count."""
    ascents = {"from the batch before": "other", "descending wrong answers": "undesirable"}
    masks = {"positions that predict a response token": "shifted", "all tokens": "all"}
    changes: dict[str, tuple[str, dict[str, Any]]] = {}
    for name, entry in (("LoRA", "LfU LoRA"), ("steering", "LfU steering")):
        changes |= {f"{name}, {words}": (entry, {"ascent_from": value}) for words, value in ascents.items()}
        changes |= {f"{name}, {words}": (entry, {"mask": value}) for words, value in masks.items()}
    return around(rows, "questions", changes)


# The paper's lambda as the upper bound, so that the ratio decides.
_RATIOS = {f"ratio {ratio:g}": {"lam": 5.0, "ratio": ratio} for ratio in (0.1, 1.0)}


def remedies(rows: Rows) -> list[Spec]:
    """Against a consistency term that alone drives the weights. What `compare-skills` has tuned is not repeated."""
    return around(
        rows,
        "remedies",
        {
            **{f"LoRA, {words}": ("LfU LoRA", changed) for words, changed in _RATIOS.items()},
            "LoRA, on old prompts": ("LfU LoRA", {"consistency_on": "old prompts"}),
            "LoRA, on random strings": ("LfU LoRA", {"consistency_on": "random strings"}),
            "steering, ratio 0.1": ("LfU steering", _RATIOS["ratio 0.1"]),
            "steering, annealed": ("LfU steering", {"anneal": True}),
        },
    )


def long(rows: Rows) -> list[Spec]:
    """The regime of the failure itself: 250 steps on 32 examples, all at the learning rate that was chosen for SFT."""
    best = chosen(rows, "tune-skills")
    lora: dict[str, Any] = {"flavour": "lora", "alpha": 0.1, "lam": 0.5}
    changes: dict[str, dict[str, Any]] = {
        "LfU LoRA": {},
        "LfU LoRA, annealed": {"anneal": True},
        "LfU LoRA, ratio at most 0.1": {"ratio": 0.1},
        "LfU LoRA, ratio at most 1": {"ratio": 1.0},
        "LfU LoRA, on old prompts": {"consistency_on": "old prompts"},
        "LfU LoRA, on random strings": {"consistency_on": "random strings"},
    }
    cells = [best["SFT"], best["LfU relative steering"]]
    cells += [
        Spec("", "", "lfu", label, json.dumps({**lora, **changed}, sort_keys=True))
        for label, changed in changes.items()
    ]
    return each([replace(cell, lr=best["SFT"].lr) for cell in cells], "long", ["subtract-32-long"])
