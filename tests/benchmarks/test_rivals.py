"""Rivals of LfU against the formulas of their papers, written out token by token in float64."""

from __future__ import annotations

import copy
import math
import statistics
from typing import Any

import pytest
import torch
from methods import GRIDS, METHODS
from methods.wise_ft import WiSEFT
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from tests.benchmarks.test_methods import Batch, batch, gradients, log_probabilities, make, same, trained
from tests.support.architectures import VOCAB, llama
from tests.support.cases import seeded, token_batch

OTHER: Batch = token_batch(9, vocab=VOCAB, shape=(2, 6))


def float64_loss(model: Any, data: Batch) -> Tensor:
    """The mean over response tokens, without the float32 of the library's loss."""
    log_p, targets = log_probabilities(model, data)
    return -torch.stack([row[target] for row, target in zip(log_p, targets, strict=True)]).mean()


def seen_loss(model: Any, data: Batch) -> Tensor:
    """The same from one call that a method can look at."""
    logits = model(input_ids=data["input_ids"], attention_mask=data["attention_mask"]).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), data["labels"][:, 1:], ignore_index=-100)


def base() -> nn.Module:
    """What `make()` is without its adapter."""
    return seeded(llama).double()


def losses_by_sample(model: nn.Module, data: Batch) -> list[list[Tensor]]:
    """-log p of every response token of every sample."""
    log_p, targets = log_probabilities(model, data)
    found = iter([-row[target] for row, target in zip(log_p, targets, strict=True)])
    return [[next(found) for t in range(1, len(row)) if row[t] != -100] for row in data["labels"]]


def weighted(model: nn.Module, data: Batch, weights: list[list[float]]) -> Tensor:
    """Sum of weight times loss over the number of tokens."""
    terms = [
        w * loss
        for own, losses in zip(weights, losses_by_sample(model, data), strict=True)
        for w, loss in zip(own, losses, strict=True)
    ]
    return torch.stack(terms).sum() / len(terms)


def check(name: str, want: Any, **options: Any) -> None:
    """Loss and gradient of a method that needs no preparation."""
    model, data = make(), batch()
    got = METHODS[name](model, **options)(model, data, seen_loss)
    expected = want(model, data)
    assert float(got.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    same(gradients(got, model), gradients(expected, model))
    with pytest.raises(AssertionError):
        same(gradients(seen_loss(model, data), model), gradients(METHODS[name](model)(model, data, seen_loss), model))


def test_dft() -> None:
    def want(model: nn.Module, data: Batch) -> Tensor:
        return weighted(
            model, data, [[math.exp(-float(x.detach())) for x in row] for row in losses_by_sample(model, data)]
        )

    check("dft", want)


@pytest.mark.parametrize("top_k", [4, 20])
def test_eaft(top_k: int) -> None:
    def want(model: nn.Module, data: Batch) -> Tensor:
        log_p, targets = log_probabilities(model, data)
        terms = []
        for row, target in zip(log_p, targets, strict=True):
            p = sorted((math.exp(float(x.detach())) for x in row), reverse=True)[:top_k]
            p = [x / sum(p) for x in p]
            entropy = -sum(x * math.log(x) for x in p) / math.log(min(top_k, len(row)))
            assert 0 < entropy < 1
            terms.append(-entropy * row[target])
        return torch.stack(terms).mean()

    check("eaft", want, top_k=top_k)
    with pytest.raises(ValueError, match="top_k=1"):
        METHODS["eaft"](make(), top_k=1)


@pytest.mark.parametrize("floor", [0.01, 0.5])
def test_talr(floor: float) -> None:
    def want(model: nn.Module, data: Batch) -> Tensor:
        rows = [[float(x.detach()) for x in row] for row in losses_by_sample(model, data)]
        tau = statistics.median(statistics.fmean(row) for row in rows)
        weights = [[max(math.exp(-x) ** (1 / tau), floor) for x in row] for row in rows]
        assert any(w == floor for row in weights for w in row) == (floor > 0.1)
        return weighted(model, data, weights)

    check("talr", want, floor=floor)


@pytest.mark.parametrize("peft", [True, False])
def test_asft(peft: bool) -> None:
    model, data = (make() if peft else base().train()), batch()
    method = METHODS["asft"](model, weight=0.7)
    if not peft:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn_like(p))
    got = method(model, data, seen_loss)
    own, targets = log_probabilities(model, data)
    anchor, _ = log_probabilities(base(), data)
    anchor = anchor.detach()
    dft = -torch.stack([row[t].detach().exp() * row[t] for row, t in zip(own, targets, strict=True)]).mean()
    want = dft + 0.7 * (anchor.exp() * (anchor - own)).sum(-1).mean()
    assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-12)
    same(gradients(got, model), gradients(want, model))


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_flow(temperature: float) -> None:
    model, data = make(), batch()
    method = METHODS["flow"](model, temperature=temperature)
    method.prepare([data, OTHER], seen_loss)
    got = method(model, data, seen_loss)
    rows = [losses_by_sample(base(), part) for part in (data, OTHER)]
    means = [[statistics.fmean(float(x.detach()) for x in row) for row in part] for part in rows]
    tau = temperature * statistics.median([x for part in means for x in part])
    want = weighted(
        model, data, [[math.exp(-mean / tau)] * len(row) for mean, row in zip(means[0], rows[0], strict=True)]
    )
    assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-12)
    same(gradients(got, model), gradients(want, model))


def test_stm() -> None:
    model, data = make(), batch()
    surprise = sorted(math.exp(float(x.detach())) for row in losses_by_sample(base(), data) for x in row)
    threshold = (surprise[len(surprise) // 2] + surprise[len(surprise) // 2 - 1]) / 2
    method = METHODS["stm"](model, threshold=threshold)
    method.prepare([OTHER, data], seen_loss)
    got = method(model, data, seen_loss)
    pairs = zip(losses_by_sample(base(), data), losses_by_sample(model, data), strict=True)
    kept = [
        own for of_base, of_model in pairs for b, own in zip(of_base, of_model, strict=True) if b.exp() <= threshold
    ]
    assert len(kept) == len(surprise) // 2
    want = torch.stack(kept).mean()
    assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-12)
    same(gradients(got, model), gradients(want, model))


def test_stm_with_no_token_left() -> None:
    model, data = make(), batch()
    method = METHODS["stm"](model, threshold=1.0)
    method.prepare([data], seen_loss)
    loss = method(model, data, seen_loss)
    assert float(loss.detach()) == 0.0
    assert all(float(g.abs().max()) == 0.0 for g in gradients(loss, model))


@pytest.mark.parametrize("name", ["stm", "flow"])
@pytest.mark.parametrize("peft", [True, False])
def test_the_base_model_runs_once_a_data_set(name: str, peft: bool) -> None:
    model = make() if peft else base().train()
    data, called = batch(), []
    method = METHODS[name](model)

    def loss(which: nn.Module, part: Batch) -> Tensor:
        called.append(which.training)
        return seen_loss(which, part)

    with pytest.raises(RuntimeError, match="prepare"):
        method(model, data, loss)
    called.clear()
    method.prepare([data, OTHER], loss)
    assert called == [False, False]
    assert model.training
    # A sample is the same one in another order, and padded further.
    longer = {
        "input_ids": torch.cat([data["input_ids"], torch.zeros(3, 2, dtype=torch.long)], 1).flip(0),
        "attention_mask": torch.cat([data["attention_mask"], torch.zeros(3, 2, dtype=torch.long)], 1).flip(0),
        "labels": torch.cat([data["labels"], torch.full((3, 2), -100)], 1).flip(0),
    }
    first, second = (float(method(model, part, loss).detach()) for part in (data, longer))
    assert first == pytest.approx(second, rel=1e-12)
    assert called == [False, False, True, True]
    with pytest.raises(RuntimeError, match="not known"):
        method(model, token_batch(77, vocab=VOCAB), loss)
    with pytest.raises(RuntimeError, match="called before"):
        method.prepare([data], loss)


@pytest.mark.parametrize("name", ["kl-to-base", "asft"])
def test_dropout_is_off_at_the_starting_point(name: str) -> None:
    model, modes = make(dropout=0.5), []
    model.base_model.model.model.layers[0].eval()
    before = [module.training for module in model.modules()]

    def loss(which: nn.Module, data: Batch) -> Tensor:
        modes.append(which.training)
        return seen_loss(which, data)

    METHODS[name](model)(model, batch(), loss)
    assert modes == [False, True]
    assert [module.training for module in model.modules()] == before


def test_wise_ft_of_an_adapter() -> None:
    model, data = make(), batch()
    method = METHODS["wise-ft"](model, scale=0.6)
    got = method(model, data, seen_loss)
    same(gradients(got, model), gradients(seen_loss(model, data), model))
    with torch.no_grad():
        for p in trained(model):
            p.add_(0.1 * torch.randn_like(p))
    whole, start = copy.deepcopy(model).merge_and_unload(), base()
    method.finish()
    for scale in (0.6, 0.25):
        if scale != 0.6:
            method.scale_to(scale)
        scaled = copy.deepcopy(model).merge_and_unload()
        for p, a, b in zip(scaled.parameters(), start.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(p, (1 - scale) * a + scale * b, rtol=1e-12, atol=1e-13)


def test_wise_ft_of_all_weights() -> None:
    model = base()
    method = WiSEFT(model, scale=0.3)
    start = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    end = copy.deepcopy(model)
    method.finish()
    for p, a, b in zip(model.parameters(), start.parameters(), end.parameters(), strict=True):
        torch.testing.assert_close(p, 0.7 * a + 0.3 * b, rtol=1e-12, atol=1e-13)


def test_wise_ft_refuses_weights_that_are_not_linear() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    with pytest.raises(ValueError, match="DoRA"):
        METHODS["wise-ft"](get_peft_model(llama(), config))


@pytest.mark.parametrize("name", GRIDS)
def test_every_strength_can_be_chosen_by_name(name: str) -> None:
    for settings in GRIDS[name]:
        METHODS[name](make(), **settings).finish()


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [("talr", "floor", 2.0), ("flow", "temperature", 0.0), ("stm", "threshold", 0.5), ("wise-ft", "scale", 1.5)],
)
def test_strengths_out_of_range(name: str, setting: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{setting}={value}"):
        METHODS[name](make(), **{setting: value})
