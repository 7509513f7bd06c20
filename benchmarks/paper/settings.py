"""The protocol: models, data, hyperparameters, and what each table compares.

LoRA rank 8, scale 16/8, all linear maps; AdamW, learning rate 1e-4, cosine with 10 % warm-up; 3 epochs; batch 4, four
times accumulated; bfloat16; Alpaca's template; seed 42. alpha and lambda are the paper's, per kind of model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Model:
    """A model of the paper: where it is on the hub, and LoRA's alpha and lambda for it."""

    hub: str
    alpha: float = 0.1
    lam: float = 5.0

    def steering(self) -> dict[str, float]:
        """The paper's values for steering vectors, the same for every model."""
        return {"alpha": 0.1, "lam": 0.1}


_INSTRUCT = {"alpha": 0.001, "lam": 500.0}
MODELS: dict[str, Model] = {
    "llama-3.1-8b": Model("meta-llama/Llama-3.1-8B"),
    "llama-3.1-8b-instruct": Model("meta-llama/Llama-3.1-8B-Instruct", **_INSTRUCT),
    "llama-2-7b": Model("meta-llama/Llama-2-7b-hf"),
    "mistral-7b": Model("mistralai/Mistral-7B-v0.3"),
    "qwen3-8b": Model("Qwen/Qwen3-8B-Base"),
    "qwen3-4b": Model("Qwen/Qwen3-4B-Base"),
}


@dataclass(frozen=True)
class Protocol:
    """How every run is trained."""

    lr: float = 1e-4
    warmup: float = 0.1
    epochs: int = 3
    batch_size: int = 4
    accumulate: int = 4
    max_length: int = 1024
    rank: int = 8
    lora_alpha: int = 16
    seed: int = 42


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        label: as in the table.
        method: key in `methods.METHODS`, or "sdft": SFT on responses that the model rewrote.
        settings: its hyperparameters; for LfU alpha and lambda come from the model.
    """

    label: str
    method: str = "sft"
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """What one command reproduces.

    Attributes:
        what: one line.
        data: data sets to fine-tune on, one run each.
        rows: methods.
        tasks: evaluation tasks, "all" for the eleven.
        attack_steps: steps of adversarial fine-tuning afterwards.
    """

    what: str
    data: tuple[str, ...]
    rows: tuple[Row, ...]
    tasks: tuple[str, ...] = ("all",)
    attack_steps: int = 0


SFT, NEFTUNE = Row("SFT"), Row("NEFTune", "neftune", {"noise_alpha": 5.0})
LFU_LORA = Row("LfU (LoRA)", "lfu", {"flavour": "lora"})
LFU_STEERING = Row("LfU (RepS)", "lfu", {"flavour": "steering"})
BASELINES = (SFT, NEFTUNE, Row("IM", "im"), Row("GEM", "gem", {"beta": 0.7}), Row("SDFT", "sdft"))
LAYERS = tuple(Row(f"LfU (LoRA), {part}", "lfu", {"flavour": "lora", "layers": part}) for part in
               ("early", "middle", "late", "all"))  # fmt: skip
LOSSES = (
    Row("(b) SAM", "sam", {"rho": 0.05}),
    Row("(c) feature L1", "feature-l1", {"lam": 0.01}),
    Row("(d) feature L2", "feature-l2", {"lam": 0.01}),
    Row("(e) logit KL", "logit-kl", {"flavour": "lora"}),
    Row("random direction", "lfu", {"flavour": "random"}),
)

TABLES: dict[str, Table] = {
    "table1": Table("Fine-tuning on one task", ("gsm8k", "arc_challenge"), (*BASELINES, LFU_LORA, LFU_STEERING)),
    "table3": Table("Fine-tuning on instructions", ("dolly", "lima"), (*BASELINES, LFU_LORA, LFU_STEERING)),
    "table4": Table("A few adversarial steps afterwards", ("dolly",), (SFT, LFU_LORA), ("refusal",), attack_steps=10),
    "table5b": Table("Which layers", ("gsm8k",), LAYERS),
    "table6": Table("Other regularizers", ("gsm8k",), (SFT, *LOSSES, LFU_LORA)),
    "figure5": Table("Prompt variations", ("gsm8k",), (SFT, NEFTUNE, LFU_LORA, LFU_STEERING), ("variations",)),
}
