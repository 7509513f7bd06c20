"""float16 and bfloat16: gradients that a plain float16 backward would lose, the caller's GradScaler, dtypes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lfu_reg import LfURegularizer, LfUWarning
from lfu_reg.auxiliaries.ascent import ascend, gradient_norm
from lfu_reg.hooks.forward_pass import ForwardPass
from lfu_reg.model.tokens import TokenMasks
from lfu_reg.step.float16 import FIRST_PERTURBED, FIRST_SCALE, GROWTH_INTERVAL, LossScale, LossScales
from lfu_reg.step.gradients import Retained
from lfu_reg.step.released import Released
from lfu_reg.step.settings import Settings
from lfu_reg.step.strength import Strength
from tests.support.cases import Loss, seeded
from tests.support.compare import assert_same_gradients, gradients_of, mismatch
from tests.support.harness import auxiliary
from tests.support.models import TINY
from tests.support.plain_models import TinyLM

AUXILIARIES = ("lora", "steering", "weights", "random")
STRATEGIES = ("released", "retained")
# Rounding of float16 on the way, 2**-11 per operation, through 3 blocks there and back.
FLOAT16 = 0.02
TINY_LOSS = 1e-5


def make_auxiliary(name: str) -> Any:
    return name if name == "random" else auxiliary(name)


def model_in(dtype: torch.dtype = torch.float32) -> nn.Module:
    return TINY.make().to(dtype)


def loss_in(dtype: torch.dtype | None, factor: float = 1.0) -> Loss:
    """The case's loss times `factor`, in the autocast of `dtype`."""

    def loss(model: Any, batch: Mapping[str, Any]) -> Tensor:
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            return TINY.loss(model, batch).float() * factor

    return loss


def step(
    model: nn.Module,
    name: str,
    loss: Loss,
    finish: Callable[[Tensor], Tensor] = lambda loss: loss,
    **options: Any,
) -> tuple[LfURegularizer, dict[str, Tensor | None]]:
    reg = LfURegularizer(model, make_auxiliary(name), **{"alpha": 0.05, "lam": 0.5, "seed": 3, **options})
    finish(reg(model, TINY.batch(), loss)).backward()
    reg.remove()
    return reg, gradients_of(model)


def unscaled(model: nn.Module, scaler: torch.amp.GradScaler) -> dict[str, Tensor | None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler.unscale_(optimizer)
    return gradients_of(model)


# ------------------------------------------------------------------ gradients that float16 would lose


def small(strategy: str) -> dict[str, Any]:
    """Settings whose gradients are about 1e-7, below what float16 can hold."""
    return {"strategy": strategy, "lam": 0.5 * TINY_LOSS}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", AUXILIARIES)
def test_small_gradients_under_autocast(name: str, strategy: str) -> None:
    """With a scaler they are those of float32; `released` needs none."""
    model = model_in()
    reference = copy.deepcopy(model)
    _, want = step(reference, name, loss_in(None, TINY_LOSS), **small(strategy))
    assert 1e-9 < max(float(g.abs().max()) for g in want.values() if g is not None) < 1e-5

    scaler = torch.amp.GradScaler(device="cpu")
    reg, _ = step(model, name, loss_in(torch.float16, TINY_LOSS), scaler.scale, **small(strategy))
    assert_same_gradients(unscaled(model, scaler), want, FLOAT16)
    assert float(reg.metrics["consistency_loss"]) > 0

    if strategy == "released":
        again = model_in()
        _, got = step(again, name, loss_in(torch.float16, TINY_LOSS), **small(strategy))
        assert_same_gradients(got, want, FLOAT16)


def test_plain_float16_loses_them() -> None:
    """What the test above guards against is there: a backward of the unscaled loss gives zeros."""
    model = model_in()
    loss_in(torch.float16, TINY_LOSS)(model, TINY.batch()).backward()
    reference = model_in()
    loss_in(None, TINY_LOSS)(reference, TINY.batch()).backward()
    error, _ = mismatch(gradients_of(model), gradients_of(reference))
    assert error > 0.5


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["lora", "steering", "weights"])
def test_the_ascent_is_that_of_float32(name: str, strategy: str) -> None:
    """Direction and norm of g: the scale is gone from both."""
    model = model_in()
    loss_32, loss_16 = loss_in(None, TINY_LOSS), loss_in(torch.float16, TINY_LOSS)
    options = {"alpha": 0.05, "lam": TINY_LOSS, "seed": 3, "strategy": strategy}
    found = []
    for loss in (loss_32, loss_16):
        for more in ({}, {"undesirable": TINY.batch(5)}):
            with LfURegularizer(copy.deepcopy(model), make_auxiliary(name), **options) as reg:
                reg(reg._attached.model, TINY.batch(), loss, **more)
                found.append((reg.metrics["ascent_grad_norm"], flat(reg.perturbation)))
    for (norm_32, delta_32), (norm_16, delta_16) in zip(found[:2], found[2:], strict=True):
        assert float(norm_16) == pytest.approx(float(norm_32), rel=FLOAT16)
        assert float((delta_16 - delta_32).norm()) < FLOAT16 * float(delta_32.norm())


def flat(perturbation: Mapping[str, Any]) -> Tensor:
    parts = [p[1] if isinstance(p, tuple) else p for p in perturbation.values()]  # LoRA: B, since A stays
    return torch.cat([part.flatten() for part in parts])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_later_ascent_steps_in_float16(strategy: str) -> None:
    found = []
    for dtype in (None, torch.float16):
        model = model_in()
        with LfURegularizer(model, "steering", alpha=0.05, lam=1e-5, ascent_steps=3, seed=3, strategy=strategy) as reg:
            reg(model, TINY.batch(), loss_in(dtype, TINY_LOSS))
            found.append(flat(reg.perturbation))
    assert float((found[1] - found[0]).norm()) < FLOAT16 * float(found[0].norm())


@pytest.mark.parametrize("name", AUXILIARIES)
def test_float16_weights(name: str) -> None:
    """Leaves in float16, for which the caller scales by hand: neither scale under- or overflows on the way."""
    reference = model_in(torch.float16).float()
    _, want = step(reference, name, loss_in(None, TINY_LOSS), **small("released"))
    for upstream in (1024.0, 2.0**17):
        model = model_in(torch.float16)
        _, got = step(model, name, loss_in(None, TINY_LOSS), lambda loss, f=upstream: loss * f, **small("released"))
        assert all(g is None or g.dtype is torch.float16 for g in got.values())
        rescaled = {key: None if g is None else g.float() / upstream for key, g in got.items()}
        assert_same_gradients(rescaled, want, 2 * FLOAT16)


class Float16Head(TinyLM):
    """Only the head, which no hook sees, is kept and run in float16."""

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.body(self.embed(input_ids))
        return self.head(hidden.to(self.head.weight.dtype)).float()


def test_float16_where_no_hook_sees_it() -> None:
    reference = seeded(Float16Head).float()
    reference.head.half().float()
    model = copy.deepcopy(reference)
    model.head.half()
    _, want = step(reference, "steering", loss_in(None, TINY_LOSS), **small("released"))
    _, got = step(model, "steering", loss_in(None, TINY_LOSS), lambda loss: loss * 2.0**12, **small("released"))
    got = {key: None if g is None else g.float() / 2.0**12 for key, g in got.items()}
    assert_same_gradients(got, want, 2 * FLOAT16)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_the_taps_collect_is_finite_too(strategy: str) -> None:
    """A sum over positions overflows float16 although no gradient that it sums does, nor any of a leaf."""
    model = model_in().requires_grad_(False)
    model.embed.requires_grad_(True)
    long = {"input_ids": TINY.batch(shape=(1, 7))["input_ids"].repeat(64, 9)}

    def loss(m: Any, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.float16):
            return m(batch["input_ids"]).float().sum() * 0.02

    with LfURegularizer(model, "lora", alpha=0.05, lam=1e-3, seed=3, strategy=strategy) as reg:
        reg(model, long, loss)
        assert torch.isfinite(reg.metrics["ascent_grad_norm"])
        assert float(flat(reg.perturbation).norm()) == pytest.approx(0.05, rel=1e-3)
        assert reg._progress.scales.clean.value < FIRST_SCALE


def test_the_sum_of_both_passes_has_room() -> None:
    """Each gradient fits into float16 when scaled, and their sum does not."""
    leaf = torch.ones(3, dtype=torch.float16, requires_grad=True)
    strategy = Released(auxiliary("weights"), LossScales(), [])
    terms = [(leaf.float() * 0.9).sum() for _ in range(2)]
    strategy.backward_clean(terms[0], [leaf], ForwardPass(TokenMasks({})), None)
    strength = Strength(Settings(alpha=0.1, lam=1.0)).at(0)
    strategy.backward_perturbed(terms[1], strength)
    strategy.total(strength).backward()
    assert leaf.grad is not None
    assert leaf.grad.tolist() == pytest.approx([1.8] * 3, rel=1e-3)


def test_a_scale_too_large_for_float16_leaves_is_infinite_as_ever() -> None:
    model = model_in(torch.float16)
    _, got = step(model, "steering", loss_in(None), lambda loss: loss * 2.0**20)
    assert not all(torch.isfinite(g).all() for g in got.values() if g is not None)


# ------------------------------------------------------------------ the scale finds itself


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["lora", "steering", "weights"])
def test_an_overflow_is_tried_again_with_less(name: str, strategy: str) -> None:
    """A large loss overflows at the first scale; nothing of the failed backwards is left in g or in the gradients."""
    model, factor = model_in(), 300.0
    _, want = step(copy.deepcopy(model), name, loss_in(None, factor), strategy=strategy, lam=100.0)
    reg, got = step(model, name, loss_in(torch.float16, factor), strategy=strategy, lam=100.0)
    assert reg._progress.scales.clean.value < FIRST_SCALE
    assert_same_gradients(got, want, FLOAT16)
    reference, _ = step(model_in(), name, loss_in(None, factor), strategy=strategy, lam=100.0)
    norms = [float(r.metrics["ascent_grad_norm"]) for r in (reg, reference)]
    assert norms[0] == pytest.approx(norms[1], rel=FLOAT16)


class Overflow(torch.autograd.Function):
    """The same value, an infinite gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * float("inf")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_cannot_be_represented_reaches_the_scaler(strategy: str) -> None:
    """The scaler skips the step, its scale falls, parameters stay; the next step goes well again."""
    model, scaler = model_in(), torch.amp.GradScaler(device="cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg = LfURegularizer(model, "steering", alpha=0.05, lam=0.5, strategy=strategy)
    infinite = True

    def loss(m: Any, batch: Any) -> Tensor:
        value = loss_in(torch.float16)(m, batch)
        return Overflow.apply(value) if infinite else value

    before = copy.deepcopy(model.state_dict())
    with pytest.warns(LfUWarning, match="not finite"):
        scaled = scaler.scale(reg(model, TINY.batch(), loss))
    scaled.backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**15
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert reg._progress.scales.clean.value == FIRST_SCALE / 2, "one hopeless step halves the scale once"

    infinite = False
    optimizer.zero_grad()
    scaler.scale(reg(model, TINY.batch(), loss)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**15
    assert not all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_the_scale_grows_again() -> None:
    scale = LossScale()
    scale.value = 4.0
    x = torch.ones((), requires_grad=True)
    for _ in range(GROWTH_INTERVAL):
        assert scale.value == 4.0
        gradients, used = scale.gradients(2 * x, [x], float16=True)
        assert float(gradients[0]) / used == 2.0
    assert scale.value == 8.0


@pytest.mark.parametrize("first", [FIRST_SCALE, FIRST_PERTURBED])
def test_a_loss_in_float16_is_scaled_by_what_fits(first: float) -> None:
    """A larger scale is infinite there, and torch 2.6 has no tensor of it; also when the scale has grown."""
    scale, calls = LossScale(first), list[float]()
    x = torch.ones((), dtype=torch.float16, requires_grad=True)
    for _ in range(3):
        scale.good_steps = GROWTH_INTERVAL - 1
        y = x * 0.5
        y.register_hook(lambda gradient: calls.append(float(gradient)))
        gradients, used = scale.gradients(y * 1.0, [x], float16=True)
        assert (float(gradients[0]), used) == (2.0**14, 2.0**15)
    assert calls == [2.0**15] * 3, "no backward is repeated"


def test_a_loss_of_nan_is_not_tried_sixteen_times() -> None:
    x = torch.ones((), requires_grad=True)
    calls: list[int] = []
    y = x * float("nan")
    y.register_hook(lambda g: calls.append(1))
    LossScale().gradients(y * 1.0, [x], float16=True)
    assert len(calls) == 1


def test_the_graph_is_gone_after_a_scaled_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward that may have to be repeated keeps the graph, but not beyond pass 1."""
    import weakref

    model = model_in()
    reg = LfURegularizer(model, "steering", alpha=0.05, lam=0.5)
    alive: list[int] = []
    graphs: list[Any] = []

    class Marker(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.kept = Kept()
            graphs.append(weakref.ref(ctx.kept))
            alive.append(sum(ref() is not None for ref in graphs))
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            return grad

    class Kept:
        pass

    model.blocks[0].up.register_forward_hook(lambda m, a, out: Marker.apply(out))
    reg(model, TINY.batch(), loss_in(torch.float16))  # the first step may check its replay
    assert not any(ref() for ref in graphs)
    alive.clear()
    graphs.clear()
    loss = reg(model, TINY.batch(), loss_in(torch.float16))
    assert alive == [1, 1], "the graph of pass 1 is alive in pass 2"
    assert not any(ref() for ref in graphs)
    loss.backward()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_nothing_is_read_or_repeated_without_float16(dtype: torch.dtype | None) -> None:
    model = model_in()
    reg = LfURegularizer(model, "lora", alpha=0.05, lam=0.5)
    for seed in range(2):
        reg(model, TINY.batch(seed), loss_in(dtype))
    assert reg._progress.scales.clean.good_steps == reg._progress.scales.perturbed.good_steps == 0
    half = model_in(torch.bfloat16)
    reg = LfURegularizer(half, "lora", alpha=0.05, lam=0.5)
    reg(half, TINY.batch(), loss_in(None))
    assert reg._progress.scales.clean.good_steps == 0


# ------------------------------------------------------------------ the ascent step


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("size", "root"), [(1e-6, 2), (3e4, 20)], ids=["small", "large"])
def test_unit_step_from_gradients_of_any_size(dtype: torch.dtype, size: float, root: int) -> None:
    parts = torch.full((root**2,), size, dtype=dtype).split([1, root**2 - 1])
    gradients = [parts[0], -parts[1]]
    _, step = ascend(gradients, 0.5)
    assert float(gradient_norm(step)) == pytest.approx(0.5, rel=0.01)
    assert float(gradient_norm(gradients)) == pytest.approx(root * float(gradients[0][0]), rel=1e-3)
    assert [s.dtype for s in step] == [dtype, dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan")])
def test_no_step_without_a_direction(dtype: torch.dtype, value: float) -> None:
    _, step = ascend([torch.full((7,), value, dtype=dtype)], 0.5)
    assert torch.equal(step[0], torch.zeros(7, dtype=dtype))


# ------------------------------------------------------------------ the caller's scaler


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_recipe_with_clipping(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """scale, backward, unscale_ once, clip, step, update: the update is that of float32; nobody else calls unscale_."""
    found = []
    for dtype in (None, torch.float16):
        model = model_in()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        scaler = torch.amp.GradScaler(device="cpu", enabled=dtype is not None)
        calls: list[int] = []
        unscale = torch.amp.GradScaler.unscale_
        monkeypatch.setattr(
            torch.amp.GradScaler, "unscale_", lambda s, o, c=calls, u=unscale: (c.append(1), u(s, o))[1]
        )
        with LfURegularizer(model, "steering", alpha=0.05, lam=0.5, strategy=strategy) as reg:
            loss = reg(model, TINY.batch(), loss_in(dtype))
            assert calls == []
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            scaler.step(optimizer)
            scaler.update()
        monkeypatch.undo()
        assert calls == [1]
        assert scaler.get_scale() == (FIRST_SCALE if dtype else 1.0)
        found.append((float(norm), {name: p.detach() for name, p in model.named_parameters()}))
    assert found[1][0] == pytest.approx(found[0][0], rel=FLOAT16)
    start = dict(model_in().named_parameters())
    moved = [{name: p - start[name].detach() for name, p in parameters.items()} for _, parameters in found]
    assert_same_gradients(moved[1], moved[0], 2 * FLOAT16)


@pytest.mark.parametrize("name", AUXILIARIES)
def test_a_scaled_loss_is_an_ordinary_loss(name: str) -> None:
    """In bfloat16 and float32 the scaler's factor comes out again to the last bit."""
    for dtype in (torch.float32, torch.bfloat16):
        _, want = step(model_in(dtype), name, loss_in(None))
        _, got = step(model_in(dtype), name, loss_in(None), lambda loss: loss * 2.0**16)
        for key, gradient in got.items():
            expected = want[key]
            assert (gradient is None) == (expected is None)
            if gradient is not None and expected is not None:
                assert torch.equal(gradient / 2.0**16, expected), key


def test_thirds_of_a_bfloat16_gradient_are_thirds() -> None:
    """A divisor that bfloat16 cannot hold must not bias every gradient."""
    _, whole = step(model_in(torch.bfloat16), "steering", loss_in(None))
    _, third = step(model_in(torch.bfloat16), "steering", loss_in(None), lambda loss: loss / 3)
    for key, gradient in third.items():
        expected = whole[key]
        if gradient is not None and expected is not None:
            assert torch.equal(gradient, (expected.float() / 3).to(torch.bfloat16)), key


# ------------------------------------------------------------------ dtypes at injection


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("name", ["lora", "steering", "random"])
def test_components_are_float32_and_outputs_keep_their_dtype(name: str, autocast: bool, dtype: torch.dtype) -> None:
    model = model_in(torch.float32 if autocast else dtype)
    loss = loss_in(dtype if autocast else None)
    seen: list[torch.dtype] = []
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)][:-1]  # the head is not in pass 2

    def watched() -> None:
        seen.clear()
        for module in linears:
            module.register_forward_hook(lambda m, a, out: seen.append(out.dtype))

    watched()
    loss(model, TINY.batch())
    plain = list(seen)
    for module in linears:
        module._forward_hooks.clear()
    reg = LfURegularizer(model, make_auxiliary(name), alpha=0.05, lam=0.5)
    reg(model, TINY.batch(), loss)  # checks its replay
    watched()
    reg(model, TINY.batch(), loss)
    assert seen == [*plain, *plain]
    parts = [p for value in reg.perturbation.values() for p in (value if isinstance(value, tuple) else (value,))]
    assert {part.dtype for part in parts} == {torch.float32}
    assert float(reg.metrics["consistency_loss"]) > 0


class FullPrecisionIsland(nn.Module):
    """A block whose second half is kept out of autocast, as norms and routers often are."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inside, self.island = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.inside(x).tanh().float()
        with torch.autocast("cpu", enabled=False):
            return x + self.island(x)


def islands(width: int = 24) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(FullPrecisionIsland(width) for _ in range(3)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["lora", "steering", "weights"])
def test_the_step_inside_of_the_callers_autocast(name: str, dtype: torch.dtype) -> None:
    """Its backward passes run as a plain loop's, which is told to backpropagate outside of autocast."""
    model, x = islands(), torch.randn(4, 64, 24, generator=torch.Generator().manual_seed(1))

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["x"]).square().mean()

    plain = copy.deepcopy(model)
    with torch.autocast("cpu", dtype):
        plain_loss = loss_fn(plain, {"x": x})
    (plain_loss * 2.0**12).backward()
    # So small a lambda leaves the SFT gradient alone.
    with LfURegularizer(model, name, layers=["0", "1", "2"], lam=1e-30, seed=0) as reg:
        with torch.autocast("cpu", dtype):
            loss = reg(model, {"x": x}, loss_fn)
        (loss * 2.0**12).backward()
    for got, want in zip(model.parameters(), plain.parameters(), strict=True):
        assert got.grad is not None
        torch.testing.assert_close(got.grad, want.grad, rtol=2e-3 if dtype is torch.float16 else 1e-5, atol=1e-4)


def test_the_scales_are_resumed() -> None:
    model = islands()
    reg = LfURegularizer(model, "steering", layers=["0"])
    reg._progress.scales.clean.value, reg._progress.scales.perturbed.good_steps = 64.0, 7
    state = reg.state_dict()
    reg.remove()
    resumed = LfURegularizer(model, "steering", layers=["0"])
    resumed.load_state_dict(state)
    assert resumed._progress.scales.clean.value == 64.0
    assert resumed._progress.scales.perturbed.good_steps == 7
    resumed.load_state_dict({"step": 3, "seed": 1})  # of an older version
    assert resumed._progress.scales.clean.value == 2.0**16


def test_float16_that_the_step_cannot_scale_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under sharding, where ranks would have to repeat a backward together."""

    def choose(settings: Any, engine: Any, *rest: Any) -> Retained:
        strategy = Retained(*rest)
        strategy.scales_float16 = False
        return strategy

    monkeypatch.setattr("lfu_reg.step.second_pass.choose_strategy", choose)
    model, x = islands(), torch.randn(4, 8, 24)

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["x"]).square().mean()

    with LfURegularizer(model, "steering", layers=["0"], lam=0.1) as reg:
        reg(model, {"x": x}, loss_fn)  # full precision: nothing to tell
        with torch.autocast("cpu", torch.float16), pytest.warns(LfUWarning, match="Use bfloat16"):
            reg(model, {"x": x}, loss_fn)
