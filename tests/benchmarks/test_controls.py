"""The controls for what LfU does, against steps written out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from methods import METHODS
from methods.lfu import LfU
from torch import Tensor, nn

from tests.benchmarks.test_lfu_options import ALPHA, LAM, literal, response, states
from tests.benchmarks.test_methods import batch, gradients, loss_fn, make, same, trained


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def test_the_negative_direction() -> None:
    model, data = make(), batch()
    method = METHODS["lfu-negative"](model, alpha=ALPHA, lam=LAM)
    got = gradients(method(model, data, loss_fn), model)
    method.finish()
    down, up = (gradients(literal(model, data, response, sign=sign), model) for sign in (-1.0, 1.0))
    same(got, down, 1e-6, 1e-9)
    plain = gradients(loss_fn(model, data), model)
    away, toward = (flat(g) - flat(plain) for g in (down, up))
    assert float(torch.cosine_similarity(away, toward, dim=0)) < -0.7  # to first order in alpha -1


def test_the_negative_direction_of_lora_deltas() -> None:
    model, data = make(), batch()
    moved = []
    for flavour in ("lora", "negative"):
        method = LfU(model, flavour, alpha=ALPHA, lam=LAM, seed=3)
        method(model, data, loss_fn)
        # A is drawn from the same seed; only B moves from zero at the first step, and with A the whole product.
        moved.append(method.reg.auxiliary.perturbation())
        method.finish()
    flip = 0
    for name, there in moved[0].items():
        back = moved[1][name]
        for a, b in zip(there, back, strict=True):
            flip += bool(a.abs().sum() > 0) and torch.allclose(a, -b)
    assert flip


def consistency_gradient(model: nn.Module, vectors: list[Tensor]) -> list[Tensor]:
    """Of l_cons on the batch, for given steering vectors."""
    data = batch()
    counted = response(data)
    clean, _ = states(model, data, [torch.zeros_like(v) for v in vectors], counted)
    moved, _ = states(model, data, vectors, counted)
    chosen = counted.bool()
    terms = [((m[chosen] - c[chosen].detach()) ** 2).mean() for m, c in zip(moved, clean, strict=True)]
    return gradients(sum(terms) / len(terms), model)


@pytest.mark.parametrize("name", ["extra-gradient", "lfu-negative", "extra-random-gradient"])
def test_extra_gradient(name: str) -> None:
    model, data = make(), batch()
    method = METHODS[name](model, strength=0.7, alpha=ALPHA, seed=2)
    for _ in range(2):
        loss = method(model, data, loss_fn)
        got = gradients(loss, model)
        vectors = list(method.reg.auxiliary.perturbation().values())
        assert math.sqrt(sum(float((v**2).sum()) for v in vectors)) == pytest.approx(ALPHA)
        g_sft, g_cons = gradients(loss_fn(model, data), model), consistency_gradient(model, vectors)
        factor = 0.7 * float(flat(g_sft).norm() / flat(g_cons).norm())
        same(got, [s + factor * c for s, c in zip(g_sft, g_cons, strict=True)], 1e-5, 1e-8)
    method.finish()
    assert not any(m._forward_hooks for m in model.modules())
    zero = [torch.zeros_like(v, requires_grad=True) for v in vectors]
    _, output = states(model, data, zero, response(data))
    ascent = flat(list(torch.autograd.grad(output.loss, zero)))
    along = float(torch.cosine_similarity(ascent, flat(vectors), dim=0))
    wanted = {"extra-gradient": 1.0, "lfu-negative": -1.0}.get(name)
    assert along == pytest.approx(wanted) if wanted else abs(along) < 0.9


def test_steering_only() -> None:
    model, data = make(), batch()
    before: Any = loss_fn(model, data)
    method = METHODS["steering-only"](model)
    layers = model.base_model.model.model.layers
    assert [p.shape for p in trained(model)] == [(model.config.hidden_size,)] * len(layers)
    assert float(method(model, data, loss_fn)) == float(before.detach())
    with torch.no_grad():
        for p in trained(model):
            p.copy_(0.1 * torch.randn_like(p))
    got = method(model, data, loss_fn)
    mine = gradients(got, model)
    vectors = [p.detach().clone().requires_grad_() for p in trained(model)]
    method.finish()
    assert float(loss_fn(model, data)) == float(got.detach())  # the vectors stay
    for layer in layers:
        layer._forward_hooks.clear()
    _, output = states(model, data, vectors, torch.ones(data["labels"].shape, dtype=torch.float64))
    assert float(got.detach()) == pytest.approx(float(output.loss.detach()), rel=1e-7)
    same(mine, list(torch.autograd.grad(output.loss, vectors)), 1e-5, 1e-8)
