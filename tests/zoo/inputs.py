"""Batches and losses by task. Batch size, lengths and widths are all different numbers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.cases import Batch, next_token_loss, token_batch
from tests.zoo.sizes import VOCAB

# Image tokens before the text, several codebooks: their own loss wants labels of another shape.
OWN_LOSS_IS_FOR_OTHER_INPUTS = ("GitForCausalLM", "MusicgenForCausalLM", "MusicgenMelodyForCausalLM")
SHAPE = (3, 8)
TARGET = (3, 6)


def batch_for(task: str, model: nn.Module) -> Batch:
    """A batch for a model: what its forward takes of what there is for the task."""
    offered = _OFFERS[task](model)
    accepted = inspect.signature(model.forward).parameters
    return {name: value for name, value in offered.items() if name in accepted or name == "labels"}


def loss_of(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """The model's own loss where it has one, else cross entropy of what it returns."""
    takes_labels = "labels" in inspect.signature(model.forward).parameters
    takes_labels = takes_labels and type(model).__name__ not in OWN_LOSS_IS_FOR_OTHER_INPUTS
    outputs = model(**{name: value for name, value in batch.items() if takes_labels or name != "labels"})
    if (loss := getattr(outputs, "loss", None)) is not None:
        return loss if loss.dim() == 0 else loss.mean()
    logits = outputs.logits if hasattr(outputs, "logits") else outputs[0]
    if batch["labels"].dim() == 2:
        return next_token_loss(logits, batch["labels"])
    return F.cross_entropy(logits, batch["labels"])


def _tokens(model: nn.Module) -> Batch:
    batch = token_batch(vocab=VOCAB - 8, shape=SHAPE)
    batch["input_ids"] += 4  # past the special tokens
    batch["labels"] = torch.where(batch["labels"] == -100, -100, batch["labels"] + 4)
    return batch


def _pairs(model: nn.Module) -> Batch:
    source, target = _tokens(model), token_batch(7, vocab=VOCAB - 8, shape=TARGET)
    if not getattr(model.config, "is_encoder_decoder", True):  # text after audio, in one sequence
        return source
    labels = torch.where(target["labels"] == -100, -100, target["labels"] + 4)
    return {**source, "decoder_input_ids": target["input_ids"] + 4, "labels": labels}


def _classes(model: nn.Module) -> Batch:
    return {**_tokens(model), "labels": _labels(model)}


def _images(model: nn.Module) -> Batch:
    size = _size(model.config)
    channels = getattr(model.config, "num_channels", 3) or 3
    return {"pixel_values": _noise(3, channels, *size), "labels": _labels(model)}


def _audio(model: nn.Module) -> Batch:
    is_spectrogram = hasattr(model.config, "frequency_stride")
    samples = _noise(3, 16, 8) if is_spectrogram else _noise(3, 400)
    return {"input_values": samples, "input_features": _noise(3, 16, 8), "labels": _labels(model)}


def _speech(model: nn.Module) -> Batch:
    bins = getattr(model.config, "num_mel_bins", None) or 8
    return {
        "input_features": _noise(3, bins, 128),
        "input_values": _noise(3, 400),
        **{name: _pairs(model)[name] for name in ("decoder_input_ids", "labels")},
    }


def _size(config: Any) -> tuple[int, int]:
    size = getattr(config, "image_size", None) or 32
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _labels(model: nn.Module) -> Tensor:
    return torch.arange(3) % max(int(getattr(model.config, "num_labels", 2) or 2), 1)


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


_OFFERS = {
    "causal": _tokens,
    "masked": _tokens,
    "seq2seq": _pairs,
    "classification": _classes,
    "image": _images,
    "audio": _audio,
    "speech": _speech,
}
