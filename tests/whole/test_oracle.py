"""The oracle itself: against a case worked out by hand, and its sensitivity to every setting."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from tests.support import oracle, oracle_parts
from tests.support.cases import Case, all_tokens
from tests.support.compare import mismatch
from tests.support.models import LLAMA, LSTM, TINY


def step(case: Case, setup: oracle.Setup, **changes: Any) -> oracle.Result:
    model = changes.pop("model", None) or case.make()
    generator = torch.Generator().manual_seed(5)
    a = {
        name: torch.randn(2, sizes[0], generator=generator, dtype=torch.float64)
        for name, sizes in oracle_parts.linear_maps(model, case.layers).items()
    }
    settings = {"layers": case.layers, "mask": case.mask, "batch": case.batch(), **changes}
    return oracle.step(model, settings["batch"], case.loss, settings["layers"], setup, settings["mask"], a_matrices=a)


def test_two_linear_maps_by_hand() -> None:
    """h1 = W1 x, h2 = W2 h1, l = c.h2: g1 = W2^T c, g2 = c, everything else follows on paper."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)).double()
    x, c = torch.tensor([[1.0, -2.0]], dtype=torch.float64), torch.tensor([0.5, 2.0], dtype=torch.float64)
    case = Case("", lambda: model, dict, lambda m, b: (m(b["x"]) @ c).sum(), all_tokens, ("0", "1"), 2)
    alpha, lam = 0.4, 3.0
    got = oracle.step(
        model,
        {"x": x},
        case.loss,
        ("0", "1"),
        oracle.Setup("steering", alpha=alpha, lam=lam, reduction="sum"),
        all_tokens,
    )
    w1, w2 = (layer.weight.detach() for layer in model)
    g1, g2 = w2.T @ c, c
    norm = (g1.square().sum() + g2.square().sum()).sqrt()
    d1, d2 = alpha * g1 / norm, alpha * g2 / norm
    # h1' - h1 = d1, h2' - h2 = W2 d1 + d2; with respect to theta, d is constant and h is stopped.
    gap2 = w2 @ d1 + d2
    assert float(got.consistency) == pytest.approx(float((d1.square().sum() + gap2.square().sum()) / 2), rel=1e-12)
    h1 = w1 @ x[0]
    w2_grad = torch.outer(c, h1) + lam / 2 * 2 * torch.outer(gap2, h1 + d1)
    w1_grad = torch.outer(w2.T @ c, x[0]) + lam / 2 * 2 * (torch.outer(d1, x[0]) + torch.outer(w2.T @ gap2, x[0]))
    torch.testing.assert_close(got.gradients["1.weight"], w2_grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.gradients["0.weight"], w1_grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", [TINY, LSTM], ids=lambda c: c.name)
def test_weights_are_really_moved(case: Case) -> None:
    """The perturbed pass must see theta + delta in every kind of module."""
    got = step(case, oracle.Setup("weights", alpha=0.1))
    assert float(got.consistency) > 1e-8


BASE = {name: oracle.Setup(name, alpha=0.05, lam=0.7) for name in ("lora", "steering", "weights")}
CHANGES: dict[str, dict[str, Any]] = {
    "alpha": {"alpha": 0.05001},
    "lam": {"lam": 0.7001},
    "reduction": {"reduction": "sum"},
    "stop_gradient perturbed": {"stop_gradient": "perturbed"},
    "stop_gradient none": {"stop_gradient": "none"},
    "distance": {"distance": "cosine"},
    "logits": {"distance": "logit_kl"},
    "ascent_steps": {"ascent_steps": 2},
}


@pytest.mark.parametrize("name", BASE)
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_setting_changes_the_gradients(name: str, change: str) -> None:
    right, wrong = step(TINY, BASE[name]), step(TINY, replace(BASE[name], **CHANGES[change]))
    assert mismatch(wrong.gradients, right.gradients)[0] > 1e-6


@pytest.mark.parametrize(
    "change", [{"relative": True}, {"norm": "per-layer"}, {"tokens": "all"}], ids=lambda c: next(iter(c))
)
def test_steering_flavours_differ(change: dict[str, Any]) -> None:
    right, wrong = step(TINY, BASE["steering"]), step(TINY, replace(BASE["steering"], **change))
    assert mismatch(wrong.gradients, right.gradients)[0] > 1e-6


@pytest.mark.parametrize("name", BASE)
def test_a_dropped_layer_or_a_wrong_mask_changes_the_gradients(name: str) -> None:
    right = step(LLAMA, BASE[name])
    assert mismatch(step(LLAMA, BASE[name], layers=LLAMA.layers[:-1]).gradients, right.gradients)[0] > 1e-6
    assert mismatch(step(LLAMA, BASE[name], mask=all_tokens).gradients, right.gradients)[0] > 1e-6


def test_the_model_is_left_alone() -> None:
    model = LLAMA.make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    step(LLAMA, BASE["weights"], model=model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
