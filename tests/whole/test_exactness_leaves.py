"""Trained tensors outside of the attached model get their gradients too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lfu_reg import LfURegularizer
from tests.support import oracle
from tests.support.architectures import VOCAB, WIDTH, llama
from tests.support.cases import Case, next_token_loss, seeded
from tests.support.compare import assert_same_gradients, close, gradients_of
from tests.support.harness import a_matrices_of, auxiliary, run_pair
from tests.support.models import LLAMA

AUXILIARIES = ("lora", "steering", "weights")
STRATEGIES = ("released", "retained")
PROMPT = 3


def check_leaves(pair: Any, leaves: list[Tensor], upstream: float = 0.5) -> None:
    pair.check(upstream)
    for leaf, want in zip(leaves, pair.want.leaf_gradients, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, upstream * want, rtol=1e-9, atol=1e-14)


def with_prompt(model: Any, batch: Mapping[str, Any], prompt: Tensor) -> Tensor:
    embedded = model.get_input_embeddings()(batch["input_ids"])
    embedded = torch.cat([prompt.expand(len(embedded), -1, -1), embedded], 1)
    mask = torch.cat([batch["attention_mask"].new_ones(len(embedded), PROMPT), batch["attention_mask"]], 1)
    return model(inputs_embeds=embedded, attention_mask=mask).logits


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", AUXILIARIES)
def test_soft_prompt(name: str, strategy: str, frozen: bool) -> None:
    """The model's inputs carry the prompt's history, so pass 2 must not be replayed from them without it."""
    prompt = torch.randn(PROMPT, WIDTH, dtype=torch.float64, requires_grad=True)

    def loss(model: Any, batch: Mapping[str, Any]) -> Tensor:
        return next_token_loss(with_prompt(model, batch, prompt), batch["labels"])

    def batch(seed: int = 2) -> dict[str, Any]:
        made = LLAMA.batch(seed)
        made["labels"] = torch.cat([torch.full((3, PROMPT), -100), made["labels"]], 1)
        return made

    def make() -> nn.Module:
        model = LLAMA.make()
        if frozen:
            model.model.requires_grad_(False)
        return model

    case = Case("", make, batch, loss, LLAMA.mask, LLAMA.layers, LLAMA.linears)
    pair = run_pair(case, name, reg_options={"strategy": strategy}, leaves=[prompt])
    check_leaves(pair, [prompt])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", AUXILIARIES)
def test_separate_head_and_loss_scale(name: str, strategy: str) -> None:
    """Only the trunk is attached and called; what comes after it belongs to the loss function."""
    head = nn.Linear(WIDTH, VOCAB).double()
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)

    def loss(model: Any, batch: Mapping[str, Any]) -> Tensor:
        hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        return next_token_loss(head(hidden), batch["labels"]) * scale

    layers = tuple(name.removeprefix("model.") for name in LLAMA.layers)
    case = Case("", lambda: seeded(lambda: llama().model), LLAMA.batch, loss, LLAMA.mask, layers, 28)
    leaves = [*head.parameters(), scale]
    pair = run_pair(case, name, reg_options={"strategy": strategy}, leaves=leaves)
    assert pair.reg.layers == layers
    check_leaves(pair, leaves)


@pytest.mark.filterwarnings("ignore::lfu_reg.LfUWarning")
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", AUXILIARIES)
def test_everything_in_the_model_frozen(name: str, strategy: str) -> None:
    """A linear probe: the consistency loss has no path to the head, whose gradient is that of SFT."""
    if name == "weights":
        pytest.skip("there are no trainable weights to move")
    head = nn.Linear(WIDTH, VOCAB).double()

    def loss(model: Any, batch: Mapping[str, Any]) -> Tensor:
        hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        return next_token_loss(head(hidden), batch["labels"])

    def make() -> nn.Module:
        return seeded(lambda: llama().model).requires_grad_(False)

    layers = tuple(name.removeprefix("model.") for name in LLAMA.layers)
    case = Case("", make, LLAMA.batch, loss, LLAMA.mask, layers, 28)
    leaves = list(head.parameters())
    pair = run_pair(case, name, reg_options={"strategy": strategy}, leaves=leaves)
    check_leaves(pair, leaves, 1.0)


@pytest.mark.parametrize("name", AUXILIARIES)
def test_a_part_of_the_model_called_by_the_loss(name: str) -> None:
    """The root is never called: the loss function calls the trunk and the head itself."""

    def loss(model: Any, batch: Mapping[str, Any]) -> Tensor:
        hidden = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        return next_token_loss(model.lm_head(hidden.last_hidden_state), batch["labels"])

    case = Case("", LLAMA.make, LLAMA.batch, loss, LLAMA.mask, LLAMA.layers, 28)
    run_pair(case, name).check()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", AUXILIARIES)
def test_a_loss_that_calls_the_model_twice(name: str, strategy: str) -> None:
    """Two views of the batch (as R-Drop does): both calls count, and both are replayed."""

    def loss(model: Any, batch: Mapping[str, Any]) -> Tensor:
        first = LLAMA.loss(model, batch)
        shuffled = {**batch, "input_ids": batch["input_ids"].flip(0)}
        return first + 0.5 * LLAMA.loss(model, shuffled)

    case = Case("", LLAMA.make, LLAMA.batch, loss, LLAMA.mask, LLAMA.layers, 28)
    run_pair(case, name, reg_options={"strategy": strategy}).check()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", AUXILIARIES)
def test_a_reference_pass_of_the_same_model_without_gradients(name: str, strategy: str) -> None:
    """Only the pass that is trained counts: what runs under no_grad is data."""

    def loss(model: Any, batch: Mapping[str, Any]) -> Tensor:
        with torch.no_grad():
            reference = model(input_ids=batch["input_ids"].flip(0)).logits.flip(0)
        logits = model(input_ids=batch["input_ids"]).logits
        return next_token_loss(logits, batch["labels"]) + 0.1 * (logits - reference).square().mean()

    def trained(model: Any, batch: Mapping[str, Any]) -> Tensor:
        """For the oracle, which knows nothing of no_grad: the reference from a copy."""
        logits = model(input_ids=batch["input_ids"]).logits
        return next_token_loss(logits, batch["labels"]) + 0.1 * (logits - reference).square().mean()

    if name == "weights":
        pytest.skip("the perturbed weights would move the reference as well")
    with torch.no_grad():
        reference = LLAMA.make()(input_ids=LLAMA.batch()["input_ids"].flip(0)).logits.flip(0)
    model = LLAMA.make()
    reg = LfURegularizer(model, auxiliary(name), alpha=0.05, lam=0.7, strategy=strategy)
    got = reg(model, LLAMA.batch(), loss)
    got.backward()
    setup = oracle.Setup(name, alpha=0.05, lam=0.7)
    a = a_matrices_of(reg)
    want = oracle.step(LLAMA.make(), LLAMA.batch(), trained, LLAMA.layers, setup, LLAMA.mask, a_matrices=a)
    close(got.detach(), want.loss)
    assert_same_gradients(gradients_of(model), want.gradients)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["lora", "steering"])
def test_hooks_on_parameters_act_once(name: str, strategy: str) -> None:
    """A gradient hook that scales (as for tied or sharded weights) is applied once to the sum."""
    model = LLAMA.make()
    calls: list[int] = []
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.register_hook(lambda grad: calls.append(1) or 3.0 * grad)
    weight.register_post_accumulate_grad_hook(lambda parameter: calls.append(100))
    reg = LfURegularizer(model, auxiliary(name), alpha=0.05, lam=0.7, strategy=strategy)
    loss = reg(model, LLAMA.batch(), LLAMA.loss)
    loss.backward()
    setup = oracle.Setup(name, alpha=0.05, lam=0.7)
    a = a_matrices_of(reg)
    want = oracle.step(LLAMA.make(), LLAMA.batch(), LLAMA.loss, LLAMA.layers, setup, LLAMA.mask, a_matrices=a).gradients
    key = "model.layers.1.mlp.up_proj.weight"
    assert_same_gradients(gradients_of(model), {**want, key: 3.0 * want[key]})
    assert calls.count(100) == 1


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", AUXILIARIES)
def test_the_users_autograd_grad(name: str, strategy: str) -> None:
    """As an ordinary loss: gradients of some parameters only, nothing written to .grad."""
    pair = run_pair(LLAMA, name, reg_options={"strategy": strategy})
    named = dict(list(pair.model.named_parameters())[1:7])
    found = torch.autograd.grad(pair.loss, list(named.values()))
    assert_same_gradients(dict(zip(named, found, strict=True)), {key: pair.want.gradients[key] for key in named})
    assert all(p.grad is None for p in pair.model.parameters())
