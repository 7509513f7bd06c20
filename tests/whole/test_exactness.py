"""The step against the oracle, in float64: every trainable parameter's gradient within 1e-9, the loss within 1e-12."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from lfu_reg import LfURegularizer
from tests.support import oracle
from tests.support.architectures import VOCAB
from tests.support.cases import Batch, Case, all_tokens, token_batch
from tests.support.compare import assert_same_gradients, gradients_of, mismatch
from tests.support.harness import a_matrices_of, auxiliary, run_pair
from tests.support.models import FROZEN, GPT2, LLAMA, PEFT, T5, TIED, TINY

AUXILIARIES = ("lora", "steering", "weights")
STRATEGIES = ("released", "retained")


def same_length_batch(seed: int = 2) -> Batch:
    """No padding at all, and every token a label."""
    batch = token_batch(seed, vocab=VOCAB)
    return {
        **batch,
        "attention_mask": torch.ones_like(batch["attention_mask"]),
        "labels": batch["input_ids"],
    }


def left_padded_batch(seed: int = 2) -> Batch:
    batch = token_batch(seed, vocab=VOCAB)
    return {name: tensor.flip(1) for name, tensor in batch.items()}


BATCHES = {
    "right-padded": lambda: token_batch(2, vocab=VOCAB),
    "left-padded": left_padded_batch,
    "full": same_length_batch,
}


@pytest.mark.parametrize("padding", BATCHES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", [LLAMA, PEFT, FROZEN], ids=lambda c: c.name)
@pytest.mark.parametrize("name", AUXILIARIES)
def test_matrix(name: str, case: Case, strategy: str, reduction: str, padding: str) -> None:
    pair = run_pair(case, name, reg_options={"strategy": strategy}, reduction=reduction, batch=BATCHES[padding]())
    assert pair.reg.layers == case.layers
    pair.check()


@pytest.mark.parametrize("name", AUXILIARIES)
def test_default_strategy_and_the_papers_values(name: str) -> None:
    alpha, lam = {"lora": (0.1, 5.0), "steering": (0.1, 0.1), "weights": (0.1, 5.0)}[name]
    settings = {"alpha": alpha, "lam": lam}
    with LfURegularizer.paper(LLAMA.make(), name) as paper:
        assert (paper.settings.alpha, paper.settings.lam) == (alpha, lam)
    run_pair(LLAMA, name, **settings).check()


@pytest.mark.parametrize("name", AUXILIARIES)
def test_without_labels_the_attention_mask_counts(name: str) -> None:
    case = Case(
        "attention",
        LLAMA.make,
        LLAMA.batch,
        lambda model, batch: LLAMA.loss(model, {**batch, "labels": batch["targets"]}),
        lambda batch, layer: batch["attention_mask"] != 0,
        LLAMA.layers,
        LLAMA.linears,
    )
    batch = LLAMA.batch()
    batch["targets"] = batch.pop("labels")
    run_pair(case, name, batch=batch).check()


@pytest.mark.filterwarnings("ignore:All positions count")
@pytest.mark.parametrize("name", AUXILIARIES)
def test_without_any_mask_every_position_counts(name: str) -> None:
    case = Case(
        "no mask",
        TINY.make,
        TINY.batch,
        lambda model, batch: TINY.loss(model, {"input_ids": batch["x"], "labels": batch["y"]}),
        all_tokens,
        TINY.layers,
        TINY.linears,
    )
    batch = TINY.batch()
    run_pair(case, name, batch={"x": batch["input_ids"], "y": batch["labels"]}).check()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", AUXILIARIES)
@pytest.mark.parametrize("upstream", [0.25, -3.0, 0.0])
def test_upstream_gradient(name: str, strategy: str, upstream: float) -> None:
    run_pair(LLAMA, name, reg_options={"strategy": strategy}).check(upstream)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", AUXILIARIES)
@pytest.mark.parametrize("case", [TIED, GPT2, T5], ids=lambda c: c.name)
def test_tied_embeddings(name: str, case: Case, strategy: str) -> None:
    run_pair(case, name, reg_options={"strategy": strategy}).check()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", AUXILIARIES)
def test_two_live_losses_and_one_backward(name: str, strategy: str) -> None:
    model = LLAMA.make()
    before = copy.deepcopy(model)
    reg = LfURegularizer(model, auxiliary(name), alpha=0.05, lam=0.7, strategy=strategy)
    losses, expected = [], []
    for seed, factor in ((2, 1.0), (3, 0.5)):
        batch = LLAMA.batch(seed)
        losses.append(factor * reg(model, dict(batch), LLAMA.loss))
        setup = oracle.Setup(name, alpha=0.05, lam=0.7)
        a = a_matrices_of(reg)
        want = oracle.step(before, batch, LLAMA.loss, reg.layers, setup, LLAMA.mask, a_matrices=a)
        expected.append({key: factor * g for key, g in want.gradients.items()})
    sum(losses).backward()
    total = {key: expected[0][key] + expected[1][key] for key in expected[0]}
    assert_same_gradients(gradients_of(model), total)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", AUXILIARIES)
def test_accumulates_into_existing_gradients(name: str, strategy: str) -> None:
    model = LLAMA.make()
    there = {}
    for key, parameter in model.named_parameters():
        parameter.grad = torch.randn_like(parameter)
        there[key] = parameter.grad.clone()
    pair = run_pair(LLAMA, name, model=model, reg_options={"strategy": strategy})
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, there[key]), f"{key}.grad changed before backward"
    pair.backward()
    added = {key: parameter.grad - there[key] for key, parameter in model.named_parameters()}
    assert_same_gradients(added, pair.want.gradients)


@pytest.mark.parametrize("strategy", ["auto", *STRATEGIES])
@pytest.mark.parametrize("name", AUXILIARIES)
@pytest.mark.parametrize("case", [GPT2, PEFT], ids=lambda c: c.name)
def test_lam_zero_gives_the_gradients_of_sft_bit_for_bit(case: Case, name: str, strategy: str) -> None:
    model, batch = case.make(), case.batch()
    plain = copy.deepcopy(model)
    torch.manual_seed(3)
    sft = case.loss(plain, batch)
    sft.backward()
    reg = LfURegularizer(model, auxiliary(name), alpha=0.1, lam=0.0, strategy=strategy)
    torch.manual_seed(3)
    loss = reg(model, batch, case.loss)
    loss.backward()
    assert torch.equal(loss.detach(), sft.detach())
    for (key, got), want in zip(gradients_of(model).items(), gradients_of(plain).values(), strict=True):
        assert torch.equal(got, want), key


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("name", "options", "bound"),
    [
        ("lora", {}, 0.0),
        ("steering", {}, 0.0),
        ("steering", {"relative": True}, 1e-26),  # turning by nothing still rounds
        ("weights", {}, 0.0),
    ],
)
def test_alpha_zero_gives_no_consistency_loss(name: str, options: dict[str, Any], bound: float, strategy: str) -> None:
    model = LLAMA.make()
    reg = LfURegularizer(model, auxiliary(name, **options), alpha=0.0, lam=5.0, strategy=strategy)
    loss = reg(model, LLAMA.batch(), LLAMA.loss)
    assert 0.0 <= float(reg.metrics["consistency_loss"]) <= bound
    assert float(loss.detach()) == pytest.approx(float(reg.metrics["sft_loss"]), abs=1e-20)
    loss.backward()


@pytest.mark.parametrize("name", AUXILIARIES)
@pytest.mark.parametrize(
    "wrong",
    [{"alpha": 0.05001}, {"lam": 0.7001}, {"reduction": "sum"}, {"stop_gradient": "none"}],
    ids=lambda w: next(iter(w)),
)
def test_the_comparison_notices_a_wrong_setting(name: str, wrong: dict[str, Any]) -> None:
    pair = run_pair(LLAMA, name, setup=wrong)
    pair.backward()
    assert mismatch(gradients_of(pair.model), pair.want.gradients)[0] > 1e-7


@pytest.mark.parametrize("name", AUXILIARIES)
def test_the_comparison_notices_a_dropped_layer(name: str) -> None:
    pair = run_pair(LLAMA, name, layers=LLAMA.layers[1:])
    pair.backward()
    assert mismatch(gradients_of(pair.model), pair.want.gradients)[0] > 1e-7
