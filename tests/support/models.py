"""The zoo: every kind of model that the library promises to work on, with a batch, a loss and its masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.architectures import (
    EXPERTS_ARE_LINEAR,
    MAMBA_CALLS_DT_PROJ,
    VOCAB,
    albert,
    bert,
    freeze_lower_half,
    gemma,
    gpt2,
    llama,
    mamba,
    mixtral,
    mlp,
    peft_llama,
    swin,
    t5,
    vit,
)
from tests.support.cases import (
    Batch,
    Case,
    all_tokens,
    causal_loss,
    next_token_loss,
    plain_loss,
    response_tokens,
    seeded,
    token_batch,
    unpadded_tokens,
)
from tests.support.plain_models import EncoderClassifier, LSTMStack, TinyCNN, TinyLM


def classes_of_tokens(seed: int = 2) -> Batch:
    batch = token_batch(seed, vocab=19, labels=False)
    return {**batch, "labels": torch.tensor([0, 3, 1])}


def class_loss(model: Any, batch: Mapping[str, Any]) -> Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return F.cross_entropy(getattr(logits, "logits", logits), batch["labels"])


def images(seed: int = 2, *, size: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(3, 3, size, size, generator=generator, dtype=torch.float64)
    return {"pixel_values": pixels, "labels": torch.tensor([0, 3, 1])}


def image_loss(model: Any, batch: Mapping[str, Any]) -> Tensor:
    logits = model(batch["pixel_values"])
    return F.cross_entropy(getattr(logits, "logits", logits), batch["labels"])


def features(seed: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(6, 5, generator=generator, dtype=torch.float64),
        "y": torch.tensor([0, 3, 1, 2, 1, 0]),
    }


def feature_loss(model: Any, batch: Mapping[str, Any]) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def pairs(seed: int = 2) -> Batch:
    """Source and target of different lengths, both with padding."""
    source = token_batch(seed, vocab=VOCAB, labels=False)
    target = token_batch(seed + 100, vocab=VOCAB, shape=(3, 5))
    return {**source, "labels": target["labels"]}


def pair_loss(model: Any, batch: Mapping[str, Any]) -> Tensor:
    return model(**batch).loss


def encoder_or_decoder(batch: Mapping[str, Any], layer: str) -> Tensor:
    return batch["attention_mask"] != 0 if layer.startswith("encoder") else batch["labels"] != -100


def mamba_loss(model: Any, batch: Mapping[str, Any]) -> Tensor:
    # Its head always answers in float32. That is pass 1 only, where every implementation rounds alike.
    return next_token_loss(model(input_ids=batch["input_ids"]).logits.double(), batch["labels"])


def llm_batch(seed: int = 2, **changes: Any) -> Batch:
    return token_batch(seed, vocab=VOCAB, **changes)


def _llm(name: str, make: Any, layers: tuple[str, ...], linears: int) -> Case:
    return Case(name, lambda: seeded(make), llm_batch, causal_loss, response_tokens, layers, linears)


def _numbered(pattern: str, count: int) -> tuple[str, ...]:
    return tuple(pattern.format(i) for i in range(count))


LLAMA = _llm("llama", llama, _numbered("model.layers.{}", 4), 28)
PEFT = _llm("peft", peft_llama, _numbered("base_model.model.model.layers.{}", 4), 28)
FROZEN = _llm("frozen-half", lambda: freeze_lower_half(llama()), LLAMA.layers, 28)
TIED = _llm("tied", lambda: llama(tie_word_embeddings=True), LLAMA.layers, 28)
GEMMA = _llm("gemma", gemma, LLAMA.layers, 28)
GPT2 = _llm("gpt2", gpt2, _numbered("transformer.h.{}", 3), 12)
MIXTRAL = _llm("mixtral", mixtral, _numbered("model.layers.{}", 3), 51 if EXPERTS_ARE_LINEAR else 12)
MAMBA = Case(
    "mamba",
    lambda: seeded(mamba),
    llm_batch,
    mamba_loss,
    response_tokens,
    _numbered("backbone.layers.{}", 3),
    12 if MAMBA_CALLS_DT_PROJ else 9,  # dt_proj is never called: see LENT_WEIGHTS
)
T5 = Case(
    "t5",
    lambda: seeded(t5),
    pairs,
    pair_loss,
    encoder_or_decoder,
    (*_numbered("encoder.block.{}", 2), *_numbered("decoder.block.{}", 3)),
    2 * 6 + 3 * 10,
)
BERT = Case(
    "bert",
    lambda: seeded(bert),
    classes_of_tokens,
    class_loss,
    unpadded_tokens,
    _numbered("bert.encoder.layer.{}", 3),
    18,
)
ALBERT = Case(
    "albert",
    lambda: seeded(albert),
    classes_of_tokens,
    class_loss,
    unpadded_tokens,
    ("albert.encoder.albert_layer_groups.0",),
    6,
)
_VIT = "vit.layers.{}" if hasattr(vit().vit, "layers") else "vit.encoder.layer.{}"
VIT = Case("vit", lambda: seeded(vit), images, image_loss, all_tokens, _numbered(_VIT, 3), 18)
SWIN = Case(
    "swin",
    lambda: seeded(swin),
    lambda seed=2: images(seed, size=16),
    image_loss,
    all_tokens,
    _numbered("swin.encoder.layers.{}", 3),
    20,
)
CNN = Case(
    "cnn",
    lambda: seeded(TinyCNN),
    images,
    image_loss,
    all_tokens,
    _numbered("stages.{}", 3),
    0,
    channel_axis=1,
    auxiliaries=("steering", "weights"),
)
MLP = Case("mlp", lambda: seeded(mlp), features, feature_loss, all_tokens, ("0", "2", "4", "6"), 4)
ENCODER = Case(
    "torch-encoder",
    lambda: seeded(EncoderClassifier),
    classes_of_tokens,
    class_loss,
    unpadded_tokens,
    _numbered("encoder.layers.{}", 3),
    6,
)
LSTM = Case(
    "lstm",
    lambda: seeded(LSTMStack),
    token_batch,
    plain_loss,
    response_tokens,
    _numbered("lstms.{}", 3),
    0,
    auxiliaries=("steering", "weights"),
)
TINY = Case("tiny", lambda: seeded(TinyLM), token_batch, plain_loss, response_tokens, _numbered("blocks.{}", 3), 6)

# A warnings filter for the two cases with linear maps whose weights are lent to a function and which are never called.
LENT_WEIGHTS = r"ignore:These modules never ran.+on them. \S+\.(out_proj|dt_proj)[,.] "

ZOO = (
    LLAMA, PEFT, FROZEN, TIED, GPT2, MIXTRAL, T5, BERT, VIT, ALBERT, MAMBA, CNN, MLP, ENCODER, LSTM, SWIN, TINY,
)  # fmt: skip
