"""What every fine-tuning of the small models shares: adapter, optimizer, batches and loss."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from demo.data import collate, encode
from demo.skills import Example

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Recipe:
    """How to fine-tune; the same for every method."""

    steps: int = 60
    batch_size: int = 8
    lr: float = 2e-3
    tuning: str = "lora"
    max_length: int = 256


def trainable_copy(base: PreTrainedModel, tuning: str, seed: int) -> nn.Module:
    """A copy of the base model that is ready to train: a LoRA adapter on all linear maps, or every weight."""
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    if tuning == "lora":
        adapter = LoraConfig(task_type=TaskType.CAUSAL_LM, r=8, lora_alpha=16, target_modules="all-linear")
        with warnings.catch_warnings():  # PEFT asks transformers 5 about checkpointing by an old name
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            model = get_peft_model(model, adapter)
    return model.train()


def make_optimizer(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """AdamW over what is trainable."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)


def training_batches(
    examples: list[Example], tokenizer: PreTrainedTokenizerBase, recipe: Recipe, seed: int, device: torch.device
) -> Iterator[Batch]:
    """`recipe.steps` batches: epochs over the examples, shuffled anew each time."""
    rng = random.Random(seed)
    rows = [encode(tokenizer, example, recipe.max_length) for example in examples]
    size = min(recipe.batch_size, len(rows))
    queue: list[dict[str, list[int]]] = []
    for _ in range(recipe.steps):
        while len(queue) < size:
            queue += rng.sample(rows, len(rows))
        yield collate(queue[:size], tokenizer.pad_token_id, device)
        del queue[:size]


def sft_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Negative log-likelihood of the response tokens; what any fine-tuning script already has."""
    return model(**batch).loss
