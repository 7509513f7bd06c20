"""Every method against the formula of its paper, written out once more from logits, embeddings and weights."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from methods import METHODS
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from tests.support.architectures import VOCAB, llama
from tests.support.cases import seeded, token_batch

Batch = dict[str, Tensor]


def make(dropout: float = 0.0) -> nn.Module:
    """A tiny Llama with a LoRA adapter that has left its starting point, in float64."""
    model = get_peft_model(
        seeded(llama), LoraConfig(r=2, lora_alpha=4, lora_dropout=dropout, target_modules=["q_proj", "v_proj"])
    ).double()
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    return model.train()


def loss_fn(model: Any, batch: Batch) -> Tensor:
    return model(**batch).loss


def batch() -> Batch:
    return token_batch(2, vocab=VOCAB)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, trained(model)))


def same(left: list[Tensor], right: list[Tensor], rtol: float = 1e-7, atol: float = 1e-10) -> None:
    assert sum(float(g.norm()) for g in left) > 0
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


def log_probabilities(model: nn.Module, data: Batch) -> tuple[Tensor, Tensor]:
    """By a loop over tokens: log p at positions that predict a response token, and these tokens."""
    logits = model(input_ids=data["input_ids"], attention_mask=data["attention_mask"]).logits
    rows, targets = [], []
    for b in range(logits.shape[0]):
        for t in range(logits.shape[1] - 1):
            if data["labels"][b, t + 1] != -100:
                rows.append(logits[b, t] - torch.logsumexp(logits[b, t], 0))
                targets.append(data["labels"][b, t + 1])
    return torch.stack(rows), torch.stack(targets)


def call(name: str, model: nn.Module, **options: Any) -> Tensor:
    method = METHODS[name](model, **options)
    loss = method(model, batch(), loss_fn)
    method.finish()
    return loss


def test_sft() -> None:
    model = make()
    assert torch.equal(call("sft", model), loss_fn(model, batch()))


def test_neftune() -> None:
    model, data = make(), batch()
    torch.manual_seed(3)
    got = call("neftune", model, noise_alpha=7.0)
    torch.manual_seed(3)
    embedded = model.get_input_embeddings()(data["input_ids"])
    _, length, width = embedded.shape
    noise = torch.empty_like(embedded).uniform_(-1, 1) * 7.0 / math.sqrt(length * width)
    want = model(inputs_embeds=embedded + noise, attention_mask=data["attention_mask"], labels=data["labels"]).loss
    assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-12)
    assert float(got.detach()) != pytest.approx(float(loss_fn(model, data).detach()), rel=1e-6)
    same(gradients(got, model), gradients(want, model))


def test_instruction_modelling() -> None:
    model, data = make(), batch()
    everything = {**data, "labels": torch.where(data["attention_mask"] == 1, data["input_ids"], -100)}
    log_p, targets = log_probabilities(model, everything)
    want = -log_p[torch.arange(len(targets)), targets].mean()
    got = call("im", model)
    assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-6)
    same(gradients(got, model), gradients(want, model), 1e-4, 1e-7)  # transformers' loss is float32


@pytest.mark.parametrize("beta", [0.5, 0.7])
def test_gem(beta: float) -> None:
    model, data = make(), batch()
    log_f, targets = log_probabilities(model, data)
    terms = []
    for row, target in zip(log_f, targets, strict=True):
        q = row.detach().div(beta).exp()
        q = q / q.sum()
        terms.append((q * row).sum() - row[target])
    want = torch.stack(terms).mean()
    got = call("gem", model, beta=beta)
    assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-12)
    same(gradients(got, model), gradients(want, model))


def test_sam() -> None:
    model, data = make(), batch()
    got = gradients(call("sam", model, rho=0.1), model)
    moved = copy.deepcopy(model)
    g = gradients(loss_fn(moved, data), moved)
    norm = math.sqrt(sum(float((x**2).sum()) for x in g))
    with torch.no_grad():
        for p, x in zip(trained(moved), g, strict=True):
            p += 0.1 * x / norm
    same(got, gradients(loss_fn(moved, data), moved))
    with pytest.raises(AssertionError):
        same(got, g)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_feature_norms(norm: str) -> None:
    model, data = make(), batch()
    states = model(**data, output_hidden_states=True)
    mask = data["labels"] != -100
    seen: list[Tensor] = []
    handles = [
        layer.register_forward_hook(lambda m, a, out: seen.append(out)) for layer in model.base_model.model.model.layers
    ]
    loss = loss_fn(model, data)
    for handle in handles:
        handle.remove()
    sizes = [(h[mask].abs() if norm == "l1" else h[mask] ** 2).mean() for h in seen]
    want = loss + 0.3 * sum(sizes) / len(sizes)
    torch.testing.assert_close(seen[0], states.hidden_states[1])
    got = call(f"feature-{norm}", model, lam=0.3)
    assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-10)
    same(gradients(got, model), gradients(want, model))


def test_r_drop() -> None:
    model, data = make(dropout=0.3), batch()
    torch.manual_seed(4)
    got = call("r-drop", model, weight=0.8)
    torch.manual_seed(4)
    one, targets = log_probabilities(model, data)
    two, _ = log_probabilities(model, data)
    index = torch.arange(len(targets))
    entropy = -(one[index, targets].mean() + two[index, targets].mean()) / 2
    divergence = ((one.exp() - two.exp()) * (one - two)).sum(-1).mean() / 2  # KL(p1||p2) + KL(p2||p1), halved
    assert float(divergence.detach()) > 0
    assert float(got.detach()) == pytest.approx(float((entropy + 0.8 * divergence).detach()), rel=1e-5)
    with pytest.raises(ValueError, match="no dropout"):
        METHODS["r-drop"](make())


@pytest.mark.parametrize("peft", [True, False])
def test_kl_to_base(peft: bool) -> None:
    data = batch()
    model = make() if peft else seeded(llama).double().train()
    method = METHODS["kl-to-base"](model, weight=0.6)
    if not peft:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn_like(p))
    got = method(model, data, loss_fn)
    base_model = seeded(llama).double()
    base, _ = log_probabilities(base_model, data)
    own, _ = log_probabilities(model, data)
    divergence = (base.exp() * (base - own)).sum(-1).mean().detach()
    assert float(divergence) > 1e-6
    want = float(loss_fn(model, data).detach()) + 0.6 * float(divergence)
    assert float(got.detach()) == pytest.approx(want, rel=1e-5)


def test_l2_sp() -> None:
    model, data = make(), batch()
    method = METHODS["l2-sp"](model, weight=0.4)
    start = [p.detach().clone() for p in trained(model)]
    with torch.no_grad():
        for p in trained(model):
            p.add_(torch.randn_like(p))
    plain = gradients(loss_fn(model, data), model)
    got = gradients(method(model, data, loss_fn), model)
    same(got, [g + 0.4 * (p - s) for g, p, s in zip(plain, trained(model), start, strict=True)])


def test_ema() -> None:
    model = make()
    method = METHODS["ema"](model, decay=0.9)
    average = [p.detach().clone() for p in trained(model)]
    for _ in range(3):
        with torch.no_grad():
            for p in trained(model):
                p.add_(torch.randn_like(p))
        method.after_step()
        average = [0.9 * a + 0.1 * p.detach() for a, p in zip(average, trained(model), strict=True)]
    method.finish()
    same([p.detach() for p in trained(model)], average)


@pytest.mark.parametrize("flavour", ["lora", "steering", "relative-steering", "weights", "random", "random-steering"])
def test_lfu(flavour: str) -> None:
    model = make()
    loss = call("lfu", model, flavour=flavour, alpha=0.1, lam=1.0)
    assert float(loss.detach()) > float(loss_fn(model, batch()).detach())
    assert not any(m._forward_hooks for m in model.modules())


def test_logit_kl() -> None:
    model = make()
    assert float(call("logit-kl", model, lam=1.0).detach()) > float(loss_fn(model, batch()).detach())


def test_annealed_lam_ends_at_plain_sft() -> None:
    model, data = make(), batch()
    method = METHODS["lfu"](model, flavour="steering", lam=2.0, anneal_steps=2)
    weights = []
    for _ in range(3):
        method(model, data, loss_fn)
        weights.append(method.reg.metrics["lam"])
    method.finish()
    assert weights == [2.0, 1.0, 0.0]
