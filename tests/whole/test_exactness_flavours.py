"""Exactness of every choice: layers, flavours of steering, ascent steps, other data, stops, distances, dropout."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lfu_reg import LfURegularizer
from tests.support.architectures import bert, gpt2, llama, t5
from tests.support.cases import Case, seeded
from tests.support.compare import assert_same_gradients, close, gradients_of
from tests.support.harness import a_matrices_of, auxiliary, drawn_a_matrices, run_pair
from tests.support.models import BERT, ENCODER, FROZEN, GPT2, LENT_WEIGHTS, LLAMA, PEFT, T5, TINY
from tests.support.plain_models import EncoderClassifier, TinyLM

AUXILIARIES = ("lora", "steering", "weights")
STRATEGIES = ("released", "retained")

SUBSETS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "first": (0, (0,)),
    "last": (-1, (3,)),
    "two": ([1, 2], (1, 2)),
    "slice": (slice(0, 2), (0, 1)),
    "name": (["model.layers.1"], (1,)),
    "regex": (r"model\.layers\.[02]", (0, 2)),
    "callable": (lambda name, module: re.fullmatch(r"model\.layers\.[13]", name) is not None, (1, 3)),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", AUXILIARIES)
@pytest.mark.parametrize("subset", SUBSETS)
def test_some_layers(subset: str, name: str, strategy: str) -> None:
    """Also where pass 2 stops after the last chosen layer."""
    choice, numbers = SUBSETS[subset]
    pair = run_pair(LLAMA, name, reg_options={"layers": choice, "strategy": strategy})
    assert pair.reg.layers == tuple(LLAMA.layers[i] for i in numbers)
    pair.check()


@pytest.mark.filterwarnings("ignore::lfu_reg.LfUWarning")  # frozen lower layers: nothing to train before them
@pytest.mark.parametrize("case", [LLAMA, PEFT, FROZEN], ids=lambda c: c.name)
@pytest.mark.parametrize("third", ["early", "middle", "late"])
@pytest.mark.parametrize("name", AUXILIARIES)
def test_thirds(case: Case, third: str, name: str) -> None:
    pair = run_pair(case, name, reg_options={"layers": third})
    assert set(pair.reg.layers) < set(case.layers)
    pair.check()


@pytest.mark.parametrize("case", [LLAMA, PEFT, FROZEN], ids=lambda c: c.name)
@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize("norm", ["global", "per-layer"])
@pytest.mark.parametrize("tokens", ["masked", "all"])
def test_steering(case: Case, relative: bool, norm: str, tokens: str) -> None:
    options = {"relative": relative, "norm": norm, "tokens": tokens}
    pair = run_pair(case, "steering", aux_options=options)
    pair.check()
    for name, d in pair.reg.perturbation.items():
        torch.testing.assert_close(d, pair.want.delta[name][0], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("steps", [2, 3])
@pytest.mark.parametrize("name", AUXILIARIES)
@pytest.mark.parametrize("case", [LLAMA, PEFT], ids=lambda c: c.name)
def test_more_than_one_ascent_step(case: Case, name: str, steps: int, strategy: str) -> None:
    """From the second step on LoRA's A moves too, so the A that was drawn comes from a twin that takes one step."""
    model = case.make()
    drawn = drawn_a_matrices(case, name, model, case.batch(), seed=11)
    options = {"strategy": strategy, "seed": 11}
    pair = run_pair(case, name, model=model, reg_options=options, ascent_steps=steps, a_matrices=drawn)
    pair.check()
    for key, components in pair.reg.perturbation.items():
        got = components if isinstance(components, tuple) else (components,)
        for mine, theirs in zip(got, pair.want.delta[key], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", AUXILIARIES)
def test_two_ascent_steps_relative_per_layer_and_frozen(name: str, strategy: str) -> None:
    options = {"relative": True, "norm": "per-layer"} if name == "steering" else {}
    model = FROZEN.make()
    drawn = drawn_a_matrices(FROZEN, name, model, FROZEN.batch(), seed=11)
    reg_options = {"strategy": strategy, "seed": 11}
    run_pair(
        FROZEN,
        name,
        model=model,
        aux_options=options,
        reg_options=reg_options,
        ascent_steps=2,
        a_matrices=drawn,
    ).check()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", AUXILIARIES)
@pytest.mark.parametrize("case", [LLAMA, PEFT, FROZEN], ids=lambda c: c.name)
def test_undesirable_batch(case: Case, name: str, strategy: str) -> None:
    other = case.batch(77, shape=(2, 9))
    run_pair(case, name, reg_options={"strategy": strategy}, undesirable=other).check()


@pytest.mark.parametrize("name", AUXILIARIES)
def test_undesirable_batch_and_two_steps(name: str) -> None:
    model, other = LLAMA.make(), LLAMA.batch(77, shape=(2, 9))
    drawn = drawn_a_matrices(LLAMA, name, model, LLAMA.batch(), seed=11, undesirable=other)
    pair = run_pair(
        LLAMA,
        name,
        model=model,
        reg_options={"seed": 11},
        ascent_steps=2,
        undesirable=other,
        a_matrices=drawn,
    )
    pair.check()


@pytest.mark.parametrize("stop", ["clean", "perturbed", "none"])
@pytest.mark.parametrize("name", AUXILIARIES)
@pytest.mark.parametrize("case", [LLAMA, PEFT, FROZEN, T5], ids=lambda c: c.name)
def test_stop_gradient(case: Case, name: str, stop: str) -> None:
    run_pair(case, name, stop_gradient=stop).check()


def absolute(clean: Tensor, perturbed: Tensor) -> Tensor:
    """A user's distance, which sees [tokens, hidden]."""
    assert clean.dim() == perturbed.dim() == 2
    return (perturbed - clean).abs().sum(-1).mean() + (perturbed * clean).mean()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("distance", ["cosine", "logit_kl", absolute], ids=["cosine", "logit_kl", "callable"])
@pytest.mark.parametrize("name", AUXILIARIES)
def test_distances(name: str, distance: Any, strategy: str) -> None:
    pair = run_pair(LLAMA, name, reg_options={"strategy": strategy}, distance=distance)
    pair.check()


@pytest.mark.parametrize("stop", ["perturbed", "none"])
@pytest.mark.parametrize("distance", ["cosine", "logit_kl", absolute], ids=["cosine", "logit_kl", "callable"])
def test_distances_with_other_stops(distance: Any, stop: str) -> None:
    run_pair(LLAMA, "steering", distance=distance, stop_gradient=stop).check()


RANDOM = {
    "llama": replace(LLAMA, make=lambda: seeded(lambda: llama(attention_dropout=0.2))),
    "gpt2": replace(GPT2, make=lambda: seeded(lambda: gpt2(0.2))),
    "t5": replace(T5, make=lambda: seeded(lambda: t5(0.2))),
    "bert": replace(BERT, make=lambda: seeded(lambda: bert(0.2))),
    "tiny": replace(TINY, make=lambda: seeded(lambda: TinyLM(dropout=0.3))),
    "encoder": replace(ENCODER, make=lambda: seeded(lambda: EncoderClassifier(dropout=0.3))),
}


@pytest.mark.filterwarnings(LENT_WEIGHTS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", AUXILIARIES)
@pytest.mark.parametrize("model", RANDOM)
def test_dropout_is_the_same_in_both_passes(model: str, name: str, strategy: str) -> None:
    run_pair(RANDOM[model], name, reg_options={"strategy": strategy}, seed=9).check()


@pytest.mark.parametrize("name", AUXILIARIES)
def test_dropout_is_the_same_in_later_ascent_steps(name: str) -> None:
    case = RANDOM["tiny"]
    model = case.make()
    twin = LfURegularizer(model, auxiliary(name), alpha=0.05, lam=0.7, seed=11)
    torch.manual_seed(9)
    twin(model, case.batch(), case.loss)
    drawn = a_matrices_of(twin)
    twin.remove()
    run_pair(case, name, model=model, reg_options={"seed": 11}, ascent_steps=2, a_matrices=drawn, seed=9).check()


@pytest.mark.parametrize("name", AUXILIARIES)
def test_a_loss_function_that_draws_before_the_model_does(name: str) -> None:
    """Pass 2 starts inside the model: it has to start from the random state at that point, not at the step's start."""

    def noisy(model: Any, batch: Any) -> Tensor:
        weight = torch.rand(()) + 0.5
        loss = TINY.loss(model, batch)
        return loss * weight * (1 + torch.rand(()))

    case = Case("", RANDOM["tiny"].make, TINY.batch, noisy, TINY.mask, TINY.layers, TINY.linears)
    run_pair(case, name, seed=9).check()


@pytest.mark.parametrize("name", AUXILIARIES)
def test_dropout_makes_no_consistency_loss_by_itself(name: str) -> None:
    model = RANDOM["gpt2"].make()
    reg = LfURegularizer(model, auxiliary(name), alpha=0.0, lam=5.0)
    reg(model, GPT2.batch(), GPT2.loss)
    assert float(reg.metrics["consistency_loss"]) == 0.0


@pytest.mark.filterwarnings("ignore::lfu_reg.LfUWarning")
@pytest.mark.parametrize("name", AUXILIARIES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_empty_mask(name: str, strategy: str) -> None:
    """Defined result: no consistency loss, no NaN, plain SFT gradients."""
    case = Case("", TINY.make, TINY.batch, lambda m, b: m(b["input_ids"]).square().mean(), TINY.mask, TINY.layers, 6)
    batch = TINY.batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    pair = run_pair(case, name, batch=batch, reg_options={"strategy": strategy})
    assert float(pair.reg.metrics["consistency_loss"]) == 0.0
    close(pair.loss.detach(), pair.reg.metrics["sft_loss"])
    pair.backward()
    plain = TINY.make()
    case.loss(plain, batch).backward()
    assert_same_gradients(gradients_of(pair.model), gradients_of(plain), 0.0)
