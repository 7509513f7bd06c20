"""theta_aux: shapes, the length of the step, random directions, target_modules, and a user's own kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lfu_reg import LfURegularizer, LoRADeltas, OutputAuxiliary, RandomDirections, SteeringVectors, WeightDeltas
from tests.support.cases import seeded
from tests.support.compare import assert_same_gradients, gradients_of
from tests.support.models import GPT2, LLAMA, PEFT, TINY
from tests.support.oracle_parts import linear_maps
from tests.support.plain_models import TinyLM

KINDS: dict[str, Any] = {
    "lora": lambda: LoRADeltas(rank=3, lora_alpha=7),
    "steering": SteeringVectors,
    "relative": lambda: SteeringVectors(relative=True),
    "weights": WeightDeltas,
    "random lora": lambda: RandomDirections(LoRADeltas(rank=3)),
    "random steering": lambda: RandomDirections(SteeringVectors()),
}


def moved(perturbation: dict[str, Any]) -> list[Tensor]:
    """What the ascent has moved: B of LoRA, all of the others."""
    return [p[1] if isinstance(p, tuple) else p for p in perturbation.values()]


def length(tensors: list[Tensor]) -> float:
    return float(torch.cat([t.flatten() for t in tensors]).norm())


@pytest.mark.filterwarnings("ignore::lfu_reg.LfUWarning")  # any alpha, also absurd ones
@given(
    kind=st.sampled_from(sorted(KINDS)),
    alpha=st.floats(1e-6, 1e3),
    strategy=st.sampled_from(["released", "retained"]),
)
def test_the_step_has_length_alpha(kind: str, alpha: float, strategy: str) -> None:
    model = TINY.make()
    with LfURegularizer(model, KINDS[kind](), alpha=alpha, strategy=strategy) as reg:
        reg(model, TINY.batch(), TINY.loss)
        assert length(moved(reg.perturbation)) == pytest.approx(alpha, rel=1e-9)


@pytest.mark.parametrize("of", [SteeringVectors(norm="per-layer"), RandomDirections(SteeringVectors(norm="per-layer"))])
def test_per_layer_every_vector_has_length_alpha(of: Any) -> None:
    model = TINY.make()
    reg = LfURegularizer(model, of, alpha=0.25)
    reg(model, TINY.batch(), TINY.loss)
    assert [float(d.norm()) for d in reg.perturbation.values()] == pytest.approx([0.25] * 3, rel=1e-9)


@pytest.mark.parametrize("factor", [1e-8, 1e8])
@pytest.mark.parametrize("kind", ["lora", "steering", "weights"])
def test_the_direction_does_not_depend_on_the_losss_scale(kind: str, factor: float) -> None:
    found = []
    for scale in (1.0, factor):
        model = TINY.make()
        reg = LfURegularizer(model, KINDS[kind](), seed=3)
        reg(model, TINY.batch(), lambda m, b, s=scale: s * TINY.loss(m, b))
        found.append(moved(reg.perturbation))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)


def test_shapes() -> None:
    model = LLAMA.make()
    with LfURegularizer(model, "steering") as reg:
        reg(model, LLAMA.batch(), LLAMA.loss)
        assert {name: d.shape for name, d in reg.perturbation.items()} == dict.fromkeys(LLAMA.layers, (16,))
    with LfURegularizer(model, "lora") as reg:
        reg(model, LLAMA.batch(), LLAMA.loss)
        sizes = linear_maps(model, LLAMA.layers)
        assert {n: (a.shape, b.shape) for n, (a, b) in reg.perturbation.items()} == {
            n: ((8, i), (o, 8)) for n, (i, o) in sizes.items()
        }
    with LfURegularizer(model, "weights") as reg:
        reg(model, LLAMA.batch(), LLAMA.loss)
        want = {n: p.shape for n, p in model.named_parameters()}
        assert {n: d.shape for n, d in reg.perturbation.items()} == want
        assert not any(d.requires_grad for d in reg.perturbation.values())


def test_weights_with_peft_are_the_adapters() -> None:
    model = PEFT.make()
    reg = LfURegularizer(model, "weights")
    reg(model, PEFT.batch(), PEFT.loss)
    assert set(reg.perturbation) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in reg.perturbation)


def test_some_weights_only() -> None:
    model = TINY.make()
    reg = LfURegularizer(model, WeightDeltas(only=lambda name, parameter: "down" in name), alpha=0.05)
    reg(model, TINY.batch(), TINY.loss).backward()
    assert set(reg.perturbation) == {n for n, _ in model.named_parameters() if "down" in n}
    assert length(moved(reg.perturbation)) == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("target", "ends"),
    [
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        (["self_attn.q_proj"], {"q_proj"}),
        (r".*\.(up|down)_proj", {"up_proj", "down_proj"}),
        (r".*layers\.[0-3]\.mlp\.gate_proj", {"gate_proj"}),
    ],
    ids=lambda value: "" if isinstance(value, set) else str(value),
)
def test_target_modules(target: Any, ends: set[str]) -> None:
    model = LLAMA.make()
    reg = LfURegularizer(model, LoRADeltas(target_modules=target))
    reg(model, LLAMA.batch(), LLAMA.loss)
    assert {name.rsplit(".", 1)[-1] for name in reg.perturbation} == ends
    assert len(reg.perturbation) == 4 * len(ends)


def test_target_modules_of_conv1d() -> None:
    model = GPT2.make()
    reg = LfURegularizer(model, LoRADeltas(target_modules=["c_attn"]))
    reg(model, GPT2.batch(), GPT2.loss)
    assert [(a.shape[1], b.shape[0]) for a, b in reg.perturbation.values()] == [(16, 48)] * 3


class PackedLinear(nn.Module):
    """A quantised linear map: packed integers, no .weight, not a subclass of nn.Linear."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().max() / 127
        packed = (linear.weight.detach() / scale).round().to(torch.int8)
        self.register_buffer("packed", packed.view(torch.uint8).flatten())
        self.register_buffer("scale", scale)
        self.register_buffer("bias", linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        weight = self.packed.view(torch.int8).view(self.out_features, self.in_features).to(x.dtype) * self.scale
        return nn.functional.linear(x, weight, self.bias)


def dequantised(packed: PackedLinear) -> nn.Linear:
    linear = nn.Linear(packed.in_features, packed.out_features).double().requires_grad_(False)
    linear.weight.copy_(packed.packed.view(torch.int8).view(linear.weight.shape) * packed.scale)
    linear.bias.copy_(packed.bias)
    return linear


@pytest.mark.parametrize("strategy", ["released", "retained"])
def test_packed_linear(strategy: str) -> None:
    """The same step as with the dequantised weights in ordinary linear maps."""
    found = []
    for convert in (lambda packed: packed, dequantised):
        model: TinyLM = TINY.make()
        for block in model.blocks:
            block.up, block.down = convert(PackedLinear(block.up)), convert(PackedLinear(block.down))
        reg = LfURegularizer(model, LoRADeltas(rank=2), alpha=0.05, seed=3, strategy=strategy)
        loss = reg(model, TINY.batch(), TINY.loss)
        loss.backward()
        assert len(reg.perturbation) == 6
        found.append((loss.detach(), gradients_of(model)))
    assert float(found[0][0]) == pytest.approx(float(found[1][0]), rel=1e-12)
    assert_same_gradients(found[0][1], found[1][1])


class Gains(OutputAuxiliary):
    """A user's own: one factor per channel, h' = h * (1 + c)."""

    default_alpha, default_lam = 0.1, 0.5

    def sites(self, model: nn.Module, layers: Any) -> Any:
        return layers

    def start(self, call: Any, generator: torch.Generator) -> tuple[Tensor, ...]:
        return (call.y.new_zeros(call.y.shape[-1]),)

    def apply(self, components: Any, call: Any) -> Tensor:
        (c,) = components
        return call.y * (1 + c)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("strategy", ["released", "retained"])
def test_a_users_own_auxiliary(strategy: str, steps: int) -> None:
    model = TINY.make()
    reg = LfURegularizer(model, Gains(), alpha=0.1, strategy=strategy, ascent_steps=steps)
    loss = reg(model, TINY.batch(), TINY.loss)
    loss.backward()
    gains = {name: torch.zeros(8, dtype=torch.float64, requires_grad=True) for name in reg.layers}
    twin = TINY.make()
    for name, c in gains.items():
        twin.get_submodule(name).register_forward_hook(lambda m, a, out, c=c: out * (1 + c))
    for _ in range(steps):
        g = torch.autograd.grad(TINY.loss(twin, TINY.batch()), list(gains.values()))
        norm = torch.cat(g).norm()
        with torch.no_grad():
            for c, part in zip(gains.values(), g, strict=True):
                c += 0.1 * part / norm
    for name, c in gains.items():
        torch.testing.assert_close(reg.perturbation[name], c.detach(), rtol=1e-9, atol=1e-12)
    assert float(reg.metrics["consistency_loss"]) > 0


def test_random_directions_ignore_the_gradient_but_not_the_seed() -> None:
    def direction(seed: int, batch_seed: int) -> list[Tensor]:
        model = TINY.make()
        with LfURegularizer(model, "random", seed=seed) as reg:
            reg(model, TINY.batch(batch_seed), TINY.loss)
            return moved(reg.perturbation)

    same = zip(direction(1, 2), direction(1, 3), strict=True)
    assert all(torch.allclose(one, other, rtol=1e-6) for one, other in same)
    other = zip(direction(1, 2), direction(2, 2), strict=True)
    assert not any(torch.allclose(one, two) for one, two in other)


def test_lora_draws_anew_at_every_step() -> None:
    model = TINY.make()
    reg = LfURegularizer(model, "lora")
    drawn = []
    for _ in range(2):
        reg(model, TINY.batch(), TINY.loss)
        drawn.append({name: a.clone() for name, (a, _) in reg.perturbation.items()})
    assert not any(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    assert all(a.abs().max() > 0 for a in drawn[0].values())
    flat = [a.flatten()[:8] for a in drawn[0].values()]
    assert len({tuple(f.tolist()) for f in flat}) == len(flat), "two linear maps share one A"


def test_half_precision_gradients_do_not_overflow() -> None:
    model = seeded(TinyLM).to(torch.bfloat16)
    for scale in (1e-6, 1e6):
        with LfURegularizer(model, "steering", alpha=0.05) as reg:
            reg(model, TINY.batch(), lambda m, b, s=scale: s * TINY.loss(m, b).float())
            assert length([d.float() for d in moved(reg.perturbation)]) == pytest.approx(0.05, rel=1e-3)


def test_weights_of_one_model_are_not_moved_for_another() -> None:
    """A second regularizer with the same object: the first one would leave its own model alone without a word."""
    mine, shared = [seeded(TinyLM) for _ in range(2)], WeightDeltas()
    first, second = (LfURegularizer(model, shared, alpha=0.05) for model in mine)
    with pytest.raises(RuntimeError, match="an auxiliary of its own"):
        first(mine[0], TINY.batch(), TINY.loss)
    second(mine[1], TINY.batch(), TINY.loss).backward()
    first.remove()
    second(mine[1], TINY.batch(), TINY.loss).backward()
    assert float(second.metrics["consistency_loss"]) > 0


@pytest.mark.parametrize("strategy", ["released", "one-backward"])
def test_random_directions_leave_what_the_gradient_would(strategy: Any) -> None:
    """LoRA's A stays as it was drawn, however g is handed over, so that B alone has the length of the step."""
    model = TINY.make()
    with LfURegularizer(model, "random", alpha=0.3, lam=1.0, seed=1, strategy=strategy) as reg:
        for _ in range(2):
            reg(model, TINY.batch(), TINY.loss).backward()
        moved = [b for _, b in reg.perturbation.values()]
    assert float(torch.stack([b.double().norm() for b in moved]).norm()) == pytest.approx(0.3, rel=1e-6)
