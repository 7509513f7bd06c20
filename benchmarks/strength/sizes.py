"""The three models that a setting has to carry over between, and what they are fine-tuned on.

The two small ones come with the repository. SmolLM2-135M-Instruct, dequantised from 4 bits, is written once by
`python -m paper.smollm2 FOLDER`; LFU_SMOLLM2 names the folder.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from demo.load import EMBEDDED_MODEL, load_model
from demo.skills import Example
from demo.train import Batch, Recipe, trainable_copy, training_batches
from evidence.finetune import SMOLLM2
from evidence.tasks import TASKS, old_skills, texts
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

AUXILIARIES = ("steering", "lora", "weights")


@dataclass(frozen=True)
class Size:
    """A model, and how it is fine-tuned and examined.

    Attributes:
        folder: of the model.
        task: key in `evidence.tasks.TASKS`.
        recipe: steps, batch and lengths of fine-tuning.
        domain, kept: how many held-out examples and pieces of text are scored; None takes all.
    """

    folder: Path
    task: str
    recipe: Recipe
    domain: int | None = None
    kept: int | None = None

    def held_out(self) -> list[Example]:
        """Test examples of the task."""
        return TASKS[self.task].held_out("test")[0][: self.domain]

    def known(self) -> list[Example]:
        """What the model could do before, as test examples: WikiText, or the skills that are not fine-tuned."""
        if TASKS[self.task].base == "text":
            pieces = texts("test")["wikitext"]
            return pieces[:: len(pieces) // (self.kept or len(pieces))]
        return list(itertools.chain(*old_skills("skills", "test", 50).values()))


SIZES = {
    "0.8M": Size(EMBEDDED_MODEL, "subtract-128", Recipe(40, 8, 2e-3, "lora", 160)),
    "2.2M": Size(Path(__file__).parents[1] / "evidence" / "base_model", "gsm8k-64", Recipe(48, 4, 2e-3, "lora", 96)),
    "135M": Size(SMOLLM2, "gsm8k-64", Recipe(16, 4, 2e-3, "lora", 64), domain=24, kept=8),
}


@functools.cache
def base_of(size: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The pretrained model in float32, and its tokenizer."""
    return load_model(str(SIZES[size].folder), torch.device("cpu"), torch.float32)


def starting_point(size: str, seed: int, tuning: str = "lora") -> nn.Module:
    """A copy that is ready to be trained; the same for the same seed."""
    return trainable_copy(base_of(size)[0], tuning, seed)


def batches_of(size: str, seed: int, recipe: Recipe | None = None, task: str | None = None) -> Iterator[Batch]:
    """The batches of fine-tuning; by the size's own recipe unless another is given."""
    examples = TASKS[task or SIZES[size].task].train(seed)
    return training_batches(examples, base_of(size)[1], recipe or SIZES[size].recipe, seed, torch.device("cpu"))
