"""Models and ways to shard them: those that are measured, and those that are forecast."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from lfu_reg.cli.configs import build, load_config
from lfu_reg.cli.flops import count_steps
from lfu_reg.cli.workloads import Setting, Workload, language_model_loss, make_batch, with_adapter
from lfu_reg.model.layers import choose_layers
from sharded.bytes import STEPS, Sizes, predicted_flops, predicted_traffic, sizes_of


@dataclass(frozen=True)
class Case:
    """A model and how it is sharded.

    Attributes:
        title: for tables.
        model: a preset.
        tuning: "lora" (PEFT) or "full".
        rank: of PEFT's LoRA.
        dtype: of the weights; PEFT keeps those that it trains in float32.
        mixed: gather in bfloat16 and reduce in float32 (`MixedPrecisionPolicy`).
        root_is_freed: `reshard_after_forward=True` for the root as well.
        checkpointing: activation checkpointing.
        batch: samples on each rank.
        tokens: in a sample.
    """

    title: str
    model: str = "small"
    tuning: str = "lora"
    rank: int = 8
    dtype: str = "float32"
    mixed: bool = False
    root_is_freed: bool = False
    checkpointing: bool = False
    batch: int = 2
    tokens: int = 64

    def make_model(self, device: str) -> tuple[nn.Module, list[nn.Module]]:
        """The model in training mode and its blocks, not sharded."""
        torch.manual_seed(0)
        model: Any = build(load_config(self.model), self.dtype, device)
        if self.tuning == "lora":
            model = with_adapter(model, device, self.rank)
        if self.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model.train(), list(choose_layers(model, "all").values())

    def sizes(self, ranks: int) -> Sizes:
        """From shapes."""
        gathered, reduced = (torch.bfloat16, torch.float32) if self.mixed else (None, None)
        return sizes_of(*self.make_model("meta"), ranks, gathered=gathered, reduced=reduced)

    @cached_property
    def operations(self) -> dict[str, int]:
        """Of one SFT step, its blocks, and the head's forward, on one process."""
        model: Any = self.make_model("meta")[0]
        batch = make_batch(model, Setting(batch=self.batch, tokens=self.tokens, device="meta"))
        steps = count_steps(Workload(model, batch, language_model_loss), ("sft",))
        head = 2 * model.get_output_embeddings().weight.numel() * self.batch * self.tokens
        return {"sft": steps["sft"].flops, "blocks": steps["blocks"].flops, "head_forward": head}

    def predictions(self, ranks: int) -> dict[str, dict[str, Any]]:
        """Traffic and operations by step."""
        sizes = self.sizes(ranks)
        how = {"root_is_freed": self.root_is_freed, "checkpointing": self.checkpointing}
        return {
            step: {
                **{kind: asdict(traffic) for kind, traffic in predicted_traffic(step, sizes, **how).items()},
                "flops": predicted_flops(step, **self.operations),
            }
            for step in STEPS
        }


MEASURED = (
    Case("LoRA tuning"),
    Case("full tuning", tuning="full"),
    Case("LoRA tuning, frozen weights in bfloat16", dtype="bfloat16"),
    Case("full tuning, gathered in bfloat16, reduced in float32", tuning="full", mixed=True),
    Case("LoRA tuning of rank 1, padded on two ranks", rank=1),
    Case("LoRA tuning, checkpointed blocks", checkpointing=True),
    Case("full tuning, root freed after its forward", tuning="full", root_is_freed=True),
)
LARGE = {"model": "llama-3.1-70b", "batch": 1, "tokens": 2048}
FORECAST = (
    (Case("LoRA tuning", dtype="bfloat16", **LARGE), (8, 64)),
    (Case("full tuning, gathered in bfloat16, reduced in float32", tuning="full", mixed=True, **LARGE), (64,)),
)
