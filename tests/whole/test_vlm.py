"""A vision-language model: the trunk's input comes from a trained projector, which gets the gradients of both terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from tests.support.cases import Batch, Case, next_token_loss, seeded
from tests.support.harness import run_pair

pytestmark = pytest.mark.skipif(not hasattr(tf, "LlavaModel"), reason="an older transformers nests its parts otherwise")

AUXILIARIES = ("lora", "steering", "weights")
IMAGE, PATCHES = 39, 4
LANGUAGE = tuple(f"model.language_model.layers.{i}" for i in range(3))
ONLY_LANGUAGE = r"(.*\.)?language_model\.layers\.\d+"


def llava() -> nn.Module:
    vision = tf.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=16,
    )
    text = tf.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    config = tf.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        image_seq_length=PATCHES,
    )
    return tf.LlavaForConditionalGeneration(config)


def frozen_tower() -> nn.Module:
    model = llava()
    model.model.vision_tower.requires_grad_(False)
    return model


def projector_only() -> nn.Module:
    """LLaVA's first stage."""
    model = llava().requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    return model


def batch(seed: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 30, (3, 9), generator=generator)
    ids[:, 1 : 1 + PATCHES] = IMAGE
    attention = torch.ones_like(ids)
    attention[1, 7:] = 0
    labels = ids.masked_fill(attention == 0, -100)
    labels[:, : PATCHES + 2] = -100
    pixels = torch.randn(3, 3, 8, 8, generator=generator, dtype=torch.float64)
    return {"input_ids": ids, "attention_mask": attention, "labels": labels, "pixel_values": pixels}


def loss(model: Any, given: Mapping[str, Any]) -> Tensor:
    return next_token_loss(model(**{k: v for k, v in given.items() if k != "labels"}).logits, given["labels"])


def mask(given: Mapping[str, Any], layer: str) -> Tensor | None:
    """The vision tower's layers have no tokens of the text: all of their positions count."""
    return None if "vision" in layer else given["labels"] != -100


def case(make: Any) -> Case:
    return Case("", lambda: seeded(make), batch, loss, mask, LANGUAGE, 21)


@pytest.mark.parametrize("strategy", ["released", "retained"])
@pytest.mark.parametrize("make", [frozen_tower, projector_only])
@pytest.mark.parametrize("name", AUXILIARIES)
def test_a_trained_projector_before_the_language_model(name: str, make: Any, strategy: str) -> None:
    """The language model's inputs have a history, which both passes make."""
    pair = run_pair(case(make), name, reg_options={"layers": ONLY_LANGUAGE, "strategy": strategy})
    assert pair.reg.layers == LANGUAGE
    pair.check()
    assert float(pair.want.consistency) > 0
    assert bool(pair.model.model.multi_modal_projector.linear_1.weight.grad.any())


@pytest.mark.parametrize("name", AUXILIARIES)
def test_the_projectors_gradient_has_both_terms(name: str) -> None:
    """With lam = 0 it would be another one: the check above is not of the SFT term alone."""
    found = []
    for lam in (0.7, 1e-12):
        pair = run_pair(case(frozen_tower), name, reg_options={"layers": ONLY_LANGUAGE, "seed": 3}, lam=lam)
        pair.backward()
        found.append(pair.model.model.multi_modal_projector.linear_1.weight.grad)
    assert float((found[0] - found[1]).norm() / found[1].norm()) > 1e-6


@pytest.mark.parametrize("name", AUXILIARIES)
def test_both_stacks(name: str) -> None:
    """layers="all" takes the vision tower's blocks as well; transformers reads one of them by a hook of its own."""
    pair = run_pair(case(llava), name)
    assert (
        sum("vision" in layer for layer in pair.reg.layers)
        == sum("language" in layer for layer in pair.reg.layers)
        == 3
    )
    pair.check()


@pytest.mark.parametrize("name", AUXILIARIES)
def test_a_batch_of_text_alone(name: str) -> None:
    """The tower does not run: its layers have no hidden state in this step."""
    given = {key: value for key, value in batch().items() if key != "pixel_values"}
    given["input_ids"] = given["input_ids"].masked_fill(given["input_ids"] == IMAGE, 5)
    pair = run_pair(case(frozen_tower), name, batch=given)
    pair.check()
