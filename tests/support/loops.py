"""What the tests of training loops share: rows of tokens, a tokenizer, one-step gradients, a fixed perturbation."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, TrainerCallback, TrainingArguments

from lfu_reg import RandomDirections, SteeringVectors
from tests.support.architectures import VOCAB, llama
from tests.support.cases import seeded

STEERING = {"auxiliary": "steering", "alpha": 0.05, "lam": 0.7}


class FixedDirection(RandomDirections):
    """One direction for all steps: only with it does a batch equal the sum of its parts, as g is a batch's own."""

    def __init__(self) -> None:
        super().__init__(SteeringVectors())

    def reset(self, generators: Any) -> None:
        super().reset(lambda device: torch.Generator(device).manual_seed(3))

    def direction(self, gradients: list[Tensor]) -> list[Tensor]:
        """Also where a part alone has no gradient."""
        return super().direction([torch.ones_like(g) for g in gradients])


# What says how strong the regularizer is, with its defaults.
STRENGTH = ("gradient_ratio", "gradient_cosine", "relative_distance", "lam", "alpha")


def assert_of_strength_one(log: Mapping[str, Any]) -> None:
    """The figures of a run with the defaults, as a loop logs them."""
    assert all(f"lfu/{name}" in log for name in STRENGTH), log
    assert float(log["lfu/gradient_ratio"]) == pytest.approx(1.0, rel=0.05)
    assert -1 < float(log["lfu/gradient_cosine"]) < 1
    assert 1e-2 / 4 < float(log["lfu/relative_distance"]) < 4e-2
    assert float(log["lfu/lam"]) > 0
    assert float(log["lfu/alpha"]) > 0


FIXED = {"auxiliary": FixedDirection(), "alpha": 0.1, "lam": 100.0}


def tiny_llama(**changes: Any) -> nn.Module:
    """Float64 llama of two layers."""
    return seeded(lambda: llama(num_hidden_layers=2, **changes))


def token_rows(count: int = 8, length: int = 6, *, equal: bool = True) -> list[dict[str, list[int]]]:
    """Rows of tokens of which the first two are the prompt; of different lengths unless `equal`."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for number in range(count):
        ids = torch.randint(3, VOCAB, (length + (0 if equal else number % 3),), generator=generator).tolist()
        made.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100, -100, *ids[2:]]})
    return made


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token per letter of the alphabet, trained on the spot."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = " ".join("abcdefghijklmnopqrstuvwxyz")
    words.train_from_iterator([letters], trainers.WordLevelTrainer(special_tokens=["<pad>", "<eos>", "<unk>"]))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def quiet(where: Path, **changes: Any) -> dict[str, Any]:
    """TrainingArguments of one plain SGD step of length one: what the parameters lose is the gradient."""
    return {
        "output_dir": str(where),
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "optim": "sgd",
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "weight_decay": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **changes,
    }


def arguments(where: Path, **changes: Any) -> TrainingArguments:
    return TrainingArguments(**quiet(where, **changes))


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def descended(before: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor | None]:
    """The gradients that one SGD step of length one took away."""
    return {name: before[name] - p.detach() for name, p in model.named_parameters() if p.requires_grad}


class Fails(TrainerCallback):
    """Ends training by an exception."""

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        raise KeyError("a callback's own error")


class Remembers(TrainerCallback):
    """Copies of the logs."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(copy.copy(logs))
