"""One run: fine-tune a base model on a task by a method, and measure it."""

from __future__ import annotations

import functools
import json
import math
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from demo.eval import score
from demo.load import EMBEDDED_MODEL, load_model
from demo.skills import Example, Split
from demo.train import Recipe, make_optimizer, sft_loss, trainable_copy, training_batches
from methods import METHODS
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evidence.measure import measured, with_score
from evidence.tasks import TASKS
from evidence.unlabelled import batches

# Methods that draw from a seed of their own.
WITH_REGULARIZER = ("lfu", "logit-kl", "lfu-negative", "extra-gradient", "extra-random-gradient")
# SmolLM2-135M-Instruct, dequantised from 4 bits, is written once by `python -m paper.smollm2 FOLDER`.
SMOLLM2 = Path(os.environ.get("LFU_SMOLLM2", Path.home() / ".cache" / "lfu_reg" / "smollm2"))
BASES = {"skills": EMBEDDED_MODEL, "text": Path(__file__).parent / "base_model", "smollm2": SMOLLM2}


@dataclass(frozen=True)
class Spec:
    """All that determines a run.

    Attributes:
        experiment: what the run is for.
        task: key in TASKS.
        method: key in `methods.METHODS`.
        label: what the report calls method and settings.
        settings: hyperparameters of the method, as JSON.
        lr: learning rate of AdamW.
        seed: of data, adapter and order.
        split: what is measured on.
        tuning: "lora" or "full".
        dropout: of the LoRA adapter.
    """

    experiment: str
    task: str
    method: str
    label: str
    settings: str = "{}"
    lr: float = 2e-3
    seed: int = 0
    split: Split = "test"
    tuning: str = "lora"
    dropout: float = 0.0

    def key(self) -> str:
        """Identifies the run in the results."""
        return json.dumps(asdict(self), sort_keys=True)


@functools.cache
def base_of(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A base model in float32, and its tokenizer."""
    return load_model(str(BASES[name]), torch.device("cpu"), torch.float32)


@functools.cache
def base_scores(task: str, split: Split) -> dict[str, float]:
    """What the base model scores on a task before any fine-tuning."""
    model, tokenizer = base_of(TASKS[task].base)
    return measured(TASKS[task], split, model, tokenizer)


def starting_point(spec: Spec) -> nn.Module:
    """The base model ready to be trained; the same adapter for the same seed, whatever the method."""
    base, _ = base_of(TASKS[spec.task].base)
    if spec.dropout and spec.tuning == "lora":
        torch.manual_seed(spec.seed)
        adapter = LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=8,
            lora_alpha=16,
            lora_dropout=spec.dropout,
            target_modules="all-linear",
        )
        return get_peft_model(trainable_copy(base, "full", spec.seed), adapter).train()
    return trainable_copy(base, spec.tuning, spec.seed)


def finetuned(spec: Spec) -> tuple[nn.Module, dict[str, float]]:
    """The model after fine-tuning, and figures of the training itself."""
    return train_by(spec, TASKS[spec.task].train(spec.seed), recipe_of(spec))


def recipe_of(spec: Spec) -> Recipe:
    """How its task is fine-tuned on."""
    task = TASKS[spec.task]
    return Recipe(task.steps, task.batch_size, spec.lr, spec.tuning, task.max_length)


def train_by(spec: Spec, examples: list[Example], recipe: Recipe) -> tuple[nn.Module, dict[str, float]]:
    """Fine-tunes the spec's base model on the examples by its method, and scores it on them."""
    model, figures = fitted(spec, examples, recipe)
    figures["train_nll"] = score(model, base_of(TASKS[spec.task].base)[1], examples[:128], recipe.max_length).loss
    return model, figures


def fitted(spec: Spec, examples: list[Example], recipe: Recipe) -> tuple[nn.Module, dict[str, float]]:
    """The model after fine-tuning on the examples, and figures of the training."""
    _, tokenizer = base_of(TASKS[spec.task].base)
    model = starting_point(spec)
    settings = json.loads(spec.settings)
    if spec.method in WITH_REGULARIZER:
        settings["seed"] = spec.seed
        if settings.pop("anneal", False):
            settings["anneal_steps"] = recipe.steps
        if kind := settings.pop("consistency_on", None):
            settings["elsewhere"] = batches(kind, TASKS[spec.task].base, tokenizer, recipe.batch_size, spec.seed)
    torch.manual_seed(spec.seed)
    method = METHODS[spec.method](model, **settings)
    optimizer = make_optimizer(model, spec.lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=recipe.steps)
    started, figures = time.process_time(), {}
    epoch = replace(recipe, steps=math.ceil(len(examples) / recipe.batch_size))
    method.prepare(training_batches(examples, tokenizer, epoch, spec.seed, torch.device("cpu")), sft_loss)
    for batch in training_batches(examples, tokenizer, recipe, spec.seed, torch.device("cpu")):
        loss = method(model, batch, sft_loss)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        method.after_step()
    figures["train_seconds"] = time.process_time() - started
    if (reg := getattr(method, "reg", None)) is not None and reg.metrics.get("relative_distance") is not None:
        figures["relative_distance"] = float(reg.metrics["relative_distance"])
    method.finish()
    return model, figures


def run(spec: Spec) -> dict[str, Any]:
    """All figures of a run."""
    task = TASKS[spec.task]
    _, tokenizer = base_of(task.base)
    model, figures = finetuned(spec)
    result = measured(task, spec.split, model, tokenizer)
    return {**figures, **with_score(result, base_scores(spec.task, spec.split))}
