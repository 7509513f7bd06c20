"""The pictures of docs/pictures.md, from two runs of the model that ships here: `python -m history` in benchmarks/."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from demo.load import EMBEDDED_MODEL, load_model
from demo.skills import new_format_examples
from demo.train import Recipe, make_optimizer, sft_loss, trainable_copy, training_batches

from lfu_reg import LfURegularizer
from lfu_reg.integrations.history import History

FIGURES = Path(__file__).resolve().parents[1] / "docs" / "figures"
RECIPE = Recipe(steps=150)
CPU = torch.device("cpu")


def history_of(regularizer: Callable[[Any], LfURegularizer]) -> History:
    """Of one fine-tuning."""
    base, tokenizer = load_model(str(EMBEDDED_MODEL), CPU, torch.float32)
    model = trainable_copy(base, RECIPE.tuning, seed=0)
    optimizer, history = make_optimizer(model, RECIPE.lr), History()
    with regularizer(model) as reg:
        for batch in training_batches(new_format_examples(128, seed=0), tokenizer, RECIPE, 0, CPU):
            reg(model, batch, sft_loss).backward()
            optimizer.step()
            optimizer.zero_grad()
            history.record(reg)
    return history


if __name__ == "__main__":
    history_of(LfURegularizer).plot(FIGURES / "history.png")
    history_of(LfURegularizer.paper).plot(FIGURES / "history-paper.png")
