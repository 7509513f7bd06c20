"""PEFT's adapters: exact gradients for every kind; an adapter layer is one linear map, and its inside is none."""

from __future__ import annotations

import copy

import pytest
import torch

from lfu_reg import LfURegularizer, LoRADeltas
from tests.support.cases import Case
from tests.support.compare import assert_same_gradients, gradients_of
from tests.support.harness import auxiliary, run_pair
from tests.support.models import llm_batch
from tests.support.oracle_parts import linear_maps
from tests.support.peft_models import ADAPTERS, EXPERTS, PROMPTS, VIRTUAL, WITH_EXPERTS, behind_the_prompt, lora_config

AUXILIARIES = ("lora", "steering", "weights")
EVERY = WITH_EXPERTS


@pytest.mark.parametrize("name", AUXILIARIES)
@pytest.mark.parametrize("kind", EVERY)
def test_adapters(kind: str, name: str) -> None:
    pair = run_pair(EVERY[kind], name)
    assert pair.reg.layers == EVERY[kind].layers
    pair.check()
    assert float(pair.want.consistency) > 0


@pytest.mark.parametrize("kind", EVERY)
def test_an_adapter_layer_is_hooked_as_a_whole(kind: str) -> None:
    case = EVERY[kind]
    model = case.make()
    reg = LfURegularizer(model, auxiliary("lora"))
    reg(model, case.batch(), case.loss).backward()
    moved = {name for name, (_, b) in reg.perturbation.items() if bool(b.any())}
    assert moved == set(linear_maps(model, case.layers))
    assert len(moved) == case.linears
    assert set(reg._attached.hooks._sites) == moved  # nothing inside of an adapter layer, not even what is never called


def test_an_adapter_on_an_embedding_is_no_linear_map() -> None:
    """PEFT gives it in_features (the vocabulary) and out_features; a delta beside it would have no input."""
    case = ADAPTERS["lora"]
    model = case.make()
    model.add_adapter("other", lora_config(target_modules=["embed_tokens", "q_proj"]))
    model.set_adapter("other")
    root = "base_model.model.model"
    reg = LfURegularizer(model, LoRADeltas(rank=2), layers=[f"{root}.embed_tokens", *case.layers])
    reg(model.double(), case.batch(), case.loss)
    assert len(reg.perturbation) == case.linears


@pytest.mark.parametrize("name", AUXILIARIES)
@pytest.mark.parametrize("kind", PROMPTS)
def test_virtual_tokens(kind: str, name: str) -> None:
    """PEFT lengthens the sequence inside; the batch's labels still say which tokens count."""
    case = PROMPTS[kind]
    pair = run_pair(case, name)
    assert pair.reg.layers == case.layers
    pair.check()


def test_virtual_tokens_count_as_peft_attends_to_them() -> None:
    """Without labels the mask that PEFT hands to the model counts: virtual tokens and unpadded ones."""

    def attended(batch: dict[str, torch.Tensor], layer: str) -> torch.Tensor:
        return torch.cat([torch.ones(3, VIRTUAL, dtype=torch.bool), batch["attention_mask"] != 0], 1)

    def unlabelled(seed: int = 2) -> dict[str, torch.Tensor]:
        return {key: value for key, value in llm_batch(seed).items() if key != "labels"}

    given = PROMPTS["prompt"]
    case = Case(
        "", given.make, unlabelled, lambda m, b: m(**b).logits.square().mean(), attended, given.layers, given.linears
    )
    run_pair(case, "steering").check()


def test_a_token_mask_without_the_virtual_tokens() -> None:
    given = PROMPTS["prompt"]
    run_pair(given, "steering", reg_options={"token_mask": lambda batch: batch["labels"] != -100}).check()
    run_pair(given, "lora", reg_options={"token_mask": lambda batch: behind_the_prompt(batch, "")}).check()


def test_virtual_tokens_in_later_ascent_steps_and_in_parts_of_the_batch() -> None:
    case = PROMPTS["prompt"]
    run_pair(case, "steering", ascent_steps=2).check()
    found = []
    for options in ({}, {"token_mask": lambda batch: behind_the_prompt(batch, "")}):
        model = case.make()
        reg = LfURegularizer(model, "steering", alpha=0.05, lam=0.7, seed=3, batch_fraction=2 / 3, **options)
        reg(model, case.batch(), case.loss).backward()
        found.append(gradients_of(model))
    assert_same_gradients(*found, 0.0)


@pytest.mark.parametrize("kind", ["dora", "modules-to-save", "upper-layers", "ia3"])
@pytest.mark.parametrize("name", AUXILIARIES)
def test_checkpointing_with_frozen_embeddings(kind: str, name: str) -> None:
    case = ADAPTERS[kind]
    model = case.make()
    plain = copy.deepcopy(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = []
    for one in (model, plain):
        with LfURegularizer(one, auxiliary(name), alpha=0.05, lam=0.7, seed=3) as reg:
            reg(one, case.batch(), case.loss).backward()
        found.append(gradients_of(one))
    assert_same_gradients(*found)


@pytest.mark.skipif("experts" not in EVERY, reason="this PEFT has no target_parameters")
@pytest.mark.parametrize("name", AUXILIARIES)
def test_checkpointed_experts_with_adapters(name: str) -> None:
    """PEFT parametrises expert weights inside of the checkpoint, and named_parameters() changes its order."""
    model = EXPERTS.make()
    plain = copy.deepcopy(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = []
    for one in (model, plain):
        with LfURegularizer(one, auxiliary(name), alpha=0.05, lam=0.7, seed=3) as reg:
            for _ in range(2):
                one.zero_grad()
                reg(one, EXPERTS.batch(), EXPERTS.loss).backward()
        found.append(gradients_of(one))
    assert_same_gradients(*found)
