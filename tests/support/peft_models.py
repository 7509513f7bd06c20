"""Tiny Llamas with PEFT's adapters, one case for each kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import peft
import torch
from torch import Tensor, nn

from tests.support.architectures import llama, mixtral
from tests.support.cases import Case, causal_loss, next_token_loss, response_tokens, seeded
from tests.support.models import PEFT, llm_batch

VIRTUAL = 3
TARGETS = ["q_proj", "v_proj", "down_proj"]

# Newer releases approximate the rotation's inverse by default.
EXACT_ROTATION = {
    field.name: False for field in dataclasses.fields(peft.OFTConfig) if field.name == "use_cayley_neumann"
}


def lora_config(**changes: Any) -> peft.LoraConfig:
    settings = {"r": 2, "lora_alpha": 4, "target_modules": TARGETS, "init_lora_weights": False}
    return peft.LoraConfig(**{**settings, "task_type": "CAUSAL_LM", **changes})


CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lora_config,
    "dora": lambda: lora_config(use_dora=True),
    "rslora": lambda: lora_config(use_rslora=True),
    "lora-bias": lambda: lora_config(lora_bias=True),
    "upper-layers": lambda: lora_config(layers_to_transform=[2, 3]),
    "modules-to-save": lambda: lora_config(modules_to_save=["up_proj", "embed_tokens", "lm_head"]),
    "ia3": lambda: peft.IA3Config(
        target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "loha": lambda: peft.LoHaConfig(r=2, target_modules=TARGETS, init_weights=False),
    "adalora": lambda: peft.AdaLoraConfig(init_r=2, target_r=1, total_step=9, target_modules=TARGETS),
    "oft": lambda: peft.OFTConfig(
        r=0, oft_block_size=4, target_modules=["q_proj", "down_proj"], init_weights=False, **EXACT_ROTATION
    ),
}


def adapted(make: Callable[[], nn.Module], config: Callable[[], Any]) -> Callable[[], nn.Module]:
    return lambda: seeded(lambda: peft.get_peft_model(make(), config()))


ADAPTERS = {name: replace(PEFT, name=name, make=adapted(llama, config)) for name, config in CONFIGS.items()}

# Adapters on the experts' parameters, which PEFT wraps without a linear map of their own.
EXPERTS = replace(
    PEFT,
    name="experts",
    make=adapted(
        mixtral,
        lambda: lora_config(
            target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        ),
    ),
    layers=PEFT.layers[:3],
    linears=12,
)


def behind_the_prompt(batch: Mapping[str, Any], layer: str) -> Tensor:
    """Response tokens, which PEFT moves to the right by the virtual ones."""
    labels = batch["labels"]
    return torch.cat([torch.zeros(len(labels), VIRTUAL, dtype=torch.bool), labels != -100], 1)


def prompted_loss(model: Any, batch: Mapping[str, Any]) -> Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return next_token_loss(logits[:, VIRTUAL:], batch["labels"])


# Older releases of PEFT have no adapters on single parameters, and none that are activated by a token.
FIELDS = {field.name for field in dataclasses.fields(peft.LoraConfig)}
WITH_EXPERTS = {**ADAPTERS, **({"experts": EXPERTS} if "target_parameters" in FIELDS else {})}

PROMPT_LAYERS = tuple(f"base_model.model.layers.{i}" for i in range(4))
PROMPTS = {
    "prompt": Case(
        "prompt",
        adapted(llama, lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL)),
        llm_batch,
        prompted_loss,
        behind_the_prompt,
        PROMPT_LAYERS,
        28,
    ),
    "p-tuning": Case(
        "p-tuning",
        adapted(
            llama,
            lambda: peft.PromptEncoderConfig(
                task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL, encoder_hidden_size=8, encoder_dropout=0.0
            ),
        ),
        llm_batch,
        prompted_loss,
        behind_the_prompt,
        PROMPT_LAYERS,
        28,
    ),
    "prefix": Case(
        "prefix",
        adapted(llama, lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL)),
        llm_batch,
        causal_loss,
        response_tokens,
        PROMPT_LAYERS,
        28,
    ),
}
