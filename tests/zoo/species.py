"""What the zoo holds: a model type, the class that is built for a task, and how to make one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import nn
from transformers.models.auto import modeling_auto

from tests.zoo.overrides import CHANGES
from tests.zoo.shrink import set_dropout, tiny_config
from tests.zoo.table import SAMPLES

MAPPINGS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "image": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "audio": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "speech": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
}
MOST_PARAMETERS = 4_000_000


@dataclass(frozen=True)
class Species:
    """One row of the zoo.

    Attributes:
        task: a key of `MAPPINGS`.
        model_type: transformers' name.
        class_name: the class that transformers maps it to.
    """

    task: str
    model_type: str
    class_name: str

    def make(self, dropout: float = 0.0) -> nn.Module:
        """A tiny model with random weights, the same ones every time, in training mode and the default dtype."""
        kind = getattr(tf, self.class_name)
        config = self.config()
        if dropout and not set_dropout(config, dropout):
            raise NoDropoutError
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = kind(config).to(torch.get_default_dtype()).train()
            with torch.no_grad():
                for parameter in model.parameters():
                    # Off its initial zero or one, and off whatever was in the memory of what nobody initialises.
                    noise = 0.05 * torch.randn_like(parameter)
                    usable = torch.isfinite(parameter) & (parameter.abs() < 100)
                    parameter.copy_(torch.where(usable, parameter, 0.0) + noise)
        return model

    def config(self) -> tf.PretrainedConfig:
        """Tiny, without dropout, with implementations that know float64; ValueError where it does not get tiny."""
        kind = getattr(tf, self.class_name)
        changes = CHANGES.get(f"{self.task}/{self.model_type}", CHANGES.get(self.model_type))
        config = tiny_config(self.model_type, changes)
        if getattr(config, "is_encoder_decoder", False) and getattr(config, "decoder_start_token_id", None) is None:
            config.decoder_start_token_id = 1
        if kind.config_class is not None and not isinstance(config, kind.config_class):
            config = next((v for v in vars(config).values() if isinstance(v, kind.config_class)), config)
        for part in (config, *(v for v in vars(config).values() if isinstance(v, tf.PretrainedConfig))):
            part._experts_implementation = "eager"
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in kind(config).parameters())
        if size > MOST_PARAMETERS:
            raise ValueError(f"{size} parameters: a size in its configuration has a name that sizes.py does not know")
        return config


class NoDropoutError(Exception):
    """The configuration has no dropout rate."""


def catalogue(*tasks: str) -> Iterator[Species]:
    """Every species of the given tasks, of all tasks if none is given."""
    for task in tasks or MAPPINGS:
        for model_type, classes in getattr(modeling_auto, MAPPINGS[task]).items():
            if task in SAMPLES and model_type not in SAMPLES[task]:
                continue
            yield Species(task, model_type, classes if isinstance(classes, str) else classes[0])


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Models are made and run in this dtype for the block."""
    before: Any = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
