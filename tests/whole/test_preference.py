"""Preference losses: the policy called once or twice; a reference without gradients, copied or by disabled adapter."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfu_reg import LfURegularizer
from tests.support import oracle
from tests.support.cases import Case, token_batch
from tests.support.compare import assert_same_gradients, close, gradients_of
from tests.support.harness import a_matrices_of, auxiliary
from tests.support.models import LLAMA, PEFT, llm_batch

AUXILIARIES = ("lora", "steering", "weights")
STRATEGIES = ("released", "retained")
Reference = Callable[[Any, Mapping[str, Tensor]], Tensor]


def pairs(seed: int = 2) -> dict[str, Tensor]:
    """Chosen answers first, rejected ones after them, padded on the right to one length, as TRL's collator has it."""
    return llm_batch(seed, shape=(4, 8))


def log_probabilities(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Log-probability of each answer, [samples]."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"][:, 1:]
    each = logits[:, :-1].log_softmax(-1).gather(2, labels.clamp_min(0)[..., None]).squeeze(2)
    return (each * (labels != -100)).sum(1)


def dpo(policy: Tensor, reference: Tensor) -> Tensor:
    half = len(policy) // 2
    margin = (policy - reference)[:half] - (policy - reference)[half:]
    return -F.logsigmoid(0.3 * margin).mean()


def with_reference(reference: Reference) -> Any:
    def loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            fixed = reference(model, batch)
        return dpo(log_probabilities(model, batch), fixed)

    return loss


def with_disabled_adapter(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    with model.disable_adapter():
        return log_probabilities(model, batch)


def check(case: Case, name: str, loss: Any, oracle_loss: Any, mask: Any = None, **options: Any) -> LfURegularizer:
    """`oracle_loss` has the reference's values as constants: the oracle's perturbed passes know nothing of no_grad."""
    model = case.make()
    reg = LfURegularizer(model, auxiliary(name), **{"alpha": 0.05, "lam": 0.7, **options})
    value = reg(model, pairs(), loss)
    value.backward()
    setup = oracle.Setup(name, alpha=0.05, lam=0.7)
    a = a_matrices_of(reg)
    mask = mask or case.mask
    want = oracle.step(case.make(), pairs(), oracle_loss, case.layers, setup, mask, a_matrices=a)
    close(value.detach(), want.loss)
    assert_same_gradients(gradients_of(model), want.gradients)
    assert float(want.consistency) > 0
    return reg


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", [LLAMA, PEFT], ids=lambda case: case.name)
@pytest.mark.parametrize("name", AUXILIARIES)
def test_a_frozen_reference_model(name: str, case: Case, strategy: str) -> None:
    frozen = copy.deepcopy(case.make()).requires_grad_(False)
    with torch.no_grad():
        frozen.get_output_embeddings().weight.mul_(1.1)
    loss = with_reference(lambda model, batch: log_probabilities(frozen, batch))
    check(case, name, loss, loss, strategy=strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", AUXILIARIES)
def test_the_reference_is_the_model_without_its_adapter(name: str, strategy: str) -> None:
    with torch.no_grad():
        fixed = with_disabled_adapter(PEFT.make(), pairs())
    constant = with_reference(lambda model, batch: fixed)
    reg = check(PEFT, name, with_reference(with_disabled_adapter), constant, strategy=strategy)
    assert len(reg.layers) == 4


@pytest.mark.parametrize("name", AUXILIARIES)
def test_switched_adapters_as_reference(name: str) -> None:
    """TRL's other way: the reference is a second adapter of the same model."""

    def switched(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        model.set_adapter("reference")
        try:
            return log_probabilities(model, batch)
        finally:
            model.set_adapter("default")

    def make() -> nn.Module:
        model = PEFT.make()
        torch.manual_seed(6)
        model.add_adapter("reference", copy.deepcopy(model.peft_config["default"]))
        model.set_adapter("default")
        return model.double()

    with torch.no_grad():
        fixed = switched(make(), pairs())
    case = Case("", make, pairs, None, PEFT.mask, PEFT.layers, PEFT.linears)  # type: ignore[arg-type]
    check(case, name, with_reference(switched), with_reference(lambda model, batch: fixed))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", AUXILIARIES)
def test_two_calls_of_the_policy(name: str, strategy: str) -> None:
    """Chosen and rejected answers in calls of their own, with a reference call between them."""
    frozen = LLAMA.make().requires_grad_(False)

    def loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        halves = [{key: value[part] for key, value in batch.items()} for part in (slice(2), slice(2, None))]
        values = []
        for half in halves:
            with torch.no_grad():
                fixed = log_probabilities(frozen, half)
            values.append((log_probabilities(model, half), fixed))
        return dpo(torch.cat([v[0] for v in values]), torch.cat([v[1] for v in values]))

    def all_positions(batch: Mapping[str, Tensor], layer: str) -> None:
        """Labels [4, 8] fit no hidden state [2, 8, hidden]."""

    with pytest.warns(match="Every position counts"):
        reg = check(LLAMA, name, loss, loss, all_positions, strategy=strategy)
    assert sum(key.startswith("distance/") for key in reg.metrics) == 8


def test_two_calls_with_one_mask() -> None:
    """Where both calls have the same tokens that count, a mask of one call's shape serves both."""

    def loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        chosen = log_probabilities(model, batch)
        rejected = log_probabilities(model, {**batch, "input_ids": batch["input_ids"].flip(0)})
        return -F.logsigmoid(chosen - rejected).mean()

    check(LLAMA, "lora", loss, loss)


def test_the_reference_does_not_count_as_a_hidden_state() -> None:
    """Called on the attached model under no_grad: not captured, not perturbed."""
    model, seen = PEFT.make(), []
    reg = LfURegularizer(model, auxiliary("lora"), alpha=0.1)
    model.get_base_model().lm_head.register_forward_hook(lambda m, args, y: seen.append(torch.is_grad_enabled()))
    reg(model, pairs(), with_reference(with_disabled_adapter))
    assert seen == [False, True, False, False]  # pass 2 is out of the graph behind the last layer
    assert sum(key.startswith("distance/") for key in reg.metrics) == 4


def test_pairs_are_padded() -> None:
    batch = token_batch(vocab=29, shape=(4, 8))
    assert bool((batch["attention_mask"] == 0).any())
