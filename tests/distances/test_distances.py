"""Distances between hidden states: values, masks, layers of different width, and what a user's callable sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lfu_reg import MSE, LfURegularizer, PerLayerDistance, SteeringVectors
from lfu_reg.distances.kernels import entry
from tests.support.compare import GRADIENT_TOLERANCE, close, gradients_of, mismatch
from tests.support.harness import auxiliary, run_pair
from tests.support.models import CNN, LLAMA, SWIN, T5, TINY

BUILT_IN = ("mse", "cosine", "contrastive", "logit_kl")


@pytest.mark.parametrize("distance", BUILT_IN)
@pytest.mark.parametrize("name", ["lora", "steering", "weights"])
def test_every_distance_trains(name: str, distance: str) -> None:
    model = LLAMA.make()
    reg = LfURegularizer(model, auxiliary(name), alpha=0.05, lam=1.0, distance=distance)
    loss = reg(model, LLAMA.batch(), LLAMA.loss)
    loss.backward()
    assert float(reg.metrics["consistency_loss"]) > 0
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("distance", ["mse", "cosine", "logit_kl"])
def test_no_perturbation_no_distance(distance: str) -> None:
    model = TINY.make()
    reg = LfURegularizer(model, "steering", alpha=0.0, lam=1.0, distance=distance)
    reg(model, TINY.batch(), TINY.loss)
    assert abs(float(reg.metrics["consistency_loss"])) < 1e-15


def test_contrastive_by_hand() -> None:
    """InfoNCE: cross entropy of finding the own clean state among all tokens' by cosine similarity, temperature 0.1."""
    values: list[Tensor] = []

    def info_nce(clean: Tensor, perturbed: Tensor) -> Tensor:
        h, p = (t / t.norm(dim=-1, keepdim=True) for t in (clean, perturbed))
        similarity = (p @ h.T) / 0.1
        value = (similarity.logsumexp(-1) - similarity.diagonal()).mean()
        values.append(value.detach())
        return value

    found = []
    for distance in (info_nce, "contrastive"):
        model = LLAMA.make()
        reg = LfURegularizer(model, "steering", alpha=0.05, lam=1.0, distance=distance)
        reg(model, LLAMA.batch(), LLAMA.loss)
        found.append(float(reg.metrics["consistency_loss"]))
    assert found[1] == pytest.approx(found[0], rel=1e-10)
    assert len(values) == 4


@pytest.mark.parametrize("name", ["lora", "steering"])
def test_logit_kl_with_the_rest_of_the_zoo(name: str) -> None:
    run_pair(TINY, name, distance="logit_kl").check()


def test_a_callable_sees_tokens_that_count_only() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def distance(clean: Tensor, perturbed: Tensor) -> Tensor:
        seen.append((clean, perturbed))
        return (clean - perturbed).square().sum()

    model = LLAMA.make()
    reg = LfURegularizer(model, "steering", distance=distance)
    batch = LLAMA.batch()
    reg(model, batch, LLAMA.loss)
    counted = int((batch["labels"] != -100).sum())
    assert [c.shape for c, _ in seen] == [(counted, 16)] * 4
    assert [p.shape for _, p in seen] == [(counted, 16)] * 4
    assert not any(c.requires_grad for c, _ in seen)
    assert all(p.requires_grad for _, p in seen)


@pytest.mark.parametrize(("case", "widths"), [(SWIN, {16, 32}), (CNN, {4, 6})], ids=["swin", "cnn"])
def test_widths_that_change(case: Any, widths: set[int]) -> None:
    seen = set()

    def distance(clean: Tensor, perturbed: Tensor) -> Tensor:
        seen.add(clean.shape[1])
        return (clean - perturbed).square().mean()

    model = case.make()
    LfURegularizer(model, "steering", distance=distance)(model, case.batch(), case.loss).backward()
    assert seen == widths


def test_per_layer_distances_in_the_metrics() -> None:
    pair = run_pair(T5, "steering")
    for name, want in zip(pair.reg.layers, pair.want.layer_distances, strict=True):
        close(pair.reg.metrics[f"distance/{name}"], want, 1e-10)


def test_sum_is_the_mean_times_the_width() -> None:
    values = {}
    for reduction in ("mean", "sum"):
        model = TINY.make()
        reg = LfURegularizer(model, SteeringVectors(), reduction=reduction)
        reg(model, TINY.batch(), TINY.loss)
        values[reduction] = float(reg.metrics["consistency_loss"])
    assert values["sum"] == pytest.approx(8 * values["mean"], rel=1e-12)


def test_accumulates_in_float32_whatever_the_models_dtype() -> None:
    model = LLAMA.make().to(torch.bfloat16)
    reg = LfURegularizer(model, "steering", lam=1.0)
    loss = reg(model, LLAMA.batch(), lambda m, b: LLAMA.loss(m, b).float())
    assert reg.metrics["consistency_loss"].dtype == torch.float32
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad.dtype == torch.bfloat16 for p in model.parameters())


def test_per_layer_values_are_averaged() -> None:
    model = TINY.make()
    values = iter([1.0, 4.0, 7.0])
    reg = LfURegularizer(model, "steering", lam=1.0, distance=lambda h, p: p.sum() * 0 + next(values))
    reg(model, TINY.batch(), TINY.loss)
    assert float(reg.metrics["consistency_loss"]) == pytest.approx(4.0)


@pytest.mark.parametrize("distance", ["mse", "cosine", "contrastive"])
def test_autocast_around_the_call_does_not_reach_the_distance(distance: str) -> None:
    def in_bfloat16(model: Any, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return TINY.loss(model, batch)

    values = []
    for around in (False, True):
        model = TINY.make().float()
        with (
            LfURegularizer(model, "steering", distance=distance, alpha=0.05) as reg,
            torch.autocast("cpu", torch.bfloat16, enabled=around),
        ):
            reg(model, TINY.batch(), in_bfloat16).backward()
        values.append(reg.metrics["consistency_loss"])
    assert values[0].dtype is torch.float32
    assert torch.equal(*values)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"reduction": "sum"},
    {"stop_gradient": "perturbed"},
    {"stop_gradient": "none"},
    {"batch_fraction": 0.5},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("case", [LLAMA, T5, SWIN, CNN], ids=["llama", "t5", "swin", "cnn"])
def test_fused_and_layer_by_layer_agree(case: Any, settings: dict[str, Any]) -> None:
    """In float64: the value, the metrics of each layer, and every gradient."""
    if case in (SWIN, CNN) and "batch_fraction" in settings:
        pytest.skip("windows and batch norm mix the samples")

    class LayerByLayer(MSE):
        __call__ = PerLayerDistance.__call__

    results = []
    for distance in (MSE(), LayerByLayer()):
        model = case.make()
        reg = LfURegularizer(model, "steering", alpha=0.05, lam=1.0, distance=distance, seed=0, **settings)
        reg(model, case.batch(), case.loss).backward()
        values = {k: float(v) for k, v in reg.metrics.items() if k.startswith(("consistency", "distance/"))}
        results.append((values, gradients_of(model)))
    (values, found), (expected_values, expected) = results
    assert values == pytest.approx(expected_values, rel=1e-10)
    assert mismatch(found, expected)[0] < GRADIENT_TOLERANCE


def test_mse_takes_the_fused_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    choose = entry._choose
    monkeypatch.setattr(
        entry, "_choose", lambda problem, impl: calls.append(len(problem.layers)) or choose(problem, impl)
    )
    run_pair(LLAMA, "steering").check()
    assert calls == [4], "one call for all layers"


def test_mse_leaves_tensor_subclasses_to_their_own_operations() -> None:
    class Odd(Tensor):
        pass

    h, h_prime = torch.randn(2, 3, 4).as_subclass(Odd), torch.randn(2, 3, 4).as_subclass(Odd).requires_grad_()
    loss, per_layer = MSE()([h], [h_prime], [None], "mean")
    plain, _ = MSE()([h.as_subclass(Tensor)], [h_prime.as_subclass(Tensor)], [None], "mean")
    assert isinstance(loss, Odd)
    assert loss.item() == pytest.approx(plain.item())
    assert len(per_layer) == 1


def test_mse_inside_of_a_compiled_region() -> None:
    h, h_prime = torch.randn(2, 3, 4), torch.randn(2, 3, 4, requires_grad=True)

    def step(h: Tensor, h_prime: Tensor) -> Tensor:
        return MSE()([h], [h_prime], [None], "mean")[0]

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    assert compiled(h, h_prime).item() == pytest.approx(step(h, h_prime).item())


def test_mse_with_an_unknown_kernel() -> None:
    with pytest.raises(ValueError, match="impl='cuda'; allowed are 'auto', 'torch', 'triton'"):
        MSE(impl="cuda")  # type: ignore[arg-type]
