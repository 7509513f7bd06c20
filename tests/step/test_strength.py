"""What strength and displacement set, against gradients that are computed literally."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lfu_reg import LfURegularizer
from lfu_reg.step.strength import FIRST_STEPS
from tests.support import oracle
from tests.support.cases import Batch, Case
from tests.support.compare import Gradients, assert_same_gradients, gradients_of
from tests.support.harness import a_matrices_of, auxiliary
from tests.support.models import LLAMA, PEFT, TINY

RHO = 0.8
AUXILIARIES = ["steering", "lora", "weights"]
# So much of l_cons that its gradient is no small difference of large ones.
MUCH = 1e4


def length(gradients: Gradients) -> float:
    return float(sum(g.double().norm() ** 2 for g in gradients.values() if g is not None) ** 0.5)


def product(first: Gradients, second: Gradients) -> float:
    found = [(g, second[name]) for name, g in first.items()]
    return float(sum((g.double() * h.double()).sum() for g, h in found if g is not None and h is not None))


def plus(first: Gradients, second: Gradients, factor: float) -> dict[str, Tensor | None]:
    """first + factor * second."""
    return {
        name: g if (h := second[name]) is None else factor * h + (0 if g is None else g) for name, g in first.items()
    }


def literal(
    case: Case, model: nn.Module, reg: LfURegularizer, name: str, batch: Batch, **setup: Any
) -> tuple[Gradients, Gradients]:
    """The gradients of l_SFT and of l_cons, at the weights of `model` and the alpha of the regularizer's last step."""
    found = []
    for lam in (0.0, MUCH):
        settings = oracle.Setup(
            auxiliary=name,
            channel_axis=case.channel_axis,
            **{"alpha": float(reg.metrics["alpha"]), "lam": lam, **setup},
        )
        a_matrices = a_matrices_of(reg)
        found.append(oracle.step(model, batch, case.loss, reg.layers, settings, case.mask, a_matrices=a_matrices))
    sft, total = (result.gradients for result in found)
    return sft, {name: None if g is None else g / MUCH for name, g in plus(total, sft, -1.0).items()}


def plain_gradients(case: Case, model: nn.Module, batch: Batch) -> Gradients:
    """Those of plain SFT."""
    twin = copy.deepcopy(model)
    twin.zero_grad()
    case.loss(twin, batch).backward()
    return gradients_of(twin)


def part_of_lfu(case: Case, model: nn.Module, batch: Batch) -> float:
    """What a step has added to the gradient, in lengths of plain SFT's."""
    plain = plain_gradients(case, model, batch)
    return length(plus(gradients_of(model), plain, -1.0)) / length(plain)


def train(model: nn.Module, rate: float = 0.05) -> None:
    """A step of SGD."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad
                parameter.grad = None


SETTINGS: dict[str, dict[str, Any]] = {
    "mean": {"reduction": "mean"},
    "sum": {"reduction": "sum"},
    "cosine": {"distance": "cosine"},
}


@pytest.mark.parametrize("setup", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("case", [LLAMA, PEFT], ids=["full tuning", "LoRA tuning"])
@pytest.mark.parametrize("layers", ["all", "late"])
@pytest.mark.parametrize("name", AUXILIARIES)
def test_lam_is_the_ratio_of_the_gradients_lengths(
    name: str, layers: str, case: Case, setup: Mapping[str, Any]
) -> None:
    """Over four micro-batches, each with a lam of its own; with late layers both terms share a backward."""
    model = case.make()
    reg = LfURegularizer(model, auxiliary(name), strength=RHO, alpha=0.05, layers=layers, **setup)
    want: dict[str, Tensor | None] = {}
    for seed in range(4):
        batch = case.batch(seed)
        reg(model, dict(batch), case.loss).backward()
        sft, cons = literal(case, model, reg, name, batch, **setup)
        lam = RHO * length(sft) / length(cons)
        assert float(reg.metrics["lam"]) == pytest.approx(lam, rel=1e-9)
        assert float(reg.metrics["gradient_ratio"]) == pytest.approx(RHO, rel=1e-6)
        cosine = product(sft, cons) / length(sft) / length(cons)
        assert float(reg.metrics["gradient_cosine"]) == pytest.approx(cosine, abs=1e-6)
        total = plus(sft, cons, lam)
        want = plus(want, total, 1.0) if want else total
    assert_same_gradients(gradients_of(model), want)


@pytest.mark.parametrize("case", [LLAMA, PEFT], ids=["full tuning", "LoRA tuning"])
@pytest.mark.parametrize(("name", "factor"), [("steering", 1.15), ("lora", 2.0)])
def test_between_measurements_the_shared_part_is_estimated(name: str, factor: float, case: Case) -> None:
    """From what arrives at its border; LoRA's direction is another one at every step. Steering has nothing above it."""
    model, batch = case.make(), case.batch()
    reg = LfURegularizer(model, auxiliary(name), strength=RHO, alpha=0.05, layers="late")
    for step in range(FIRST_STEPS + 5):
        model.zero_grad()
        reg(model, dict(batch), case.loss).backward()
        wrong = part_of_lfu(case, model, batch) / RHO
        close = 1 + 1e-6 if step < FIRST_STEPS + 1 else factor
        assert 1 / close < wrong < close, step
        train(model, 0.003)


def test_a_weight_that_strength_has_found_gives_the_same_step() -> None:
    for name in AUXILIARIES:
        one, other = LLAMA.make(), LLAMA.make()
        reg = LfURegularizer(one, auxiliary(name), strength=3.0, alpha=0.05, seed=1)
        loss = reg(one, LLAMA.batch(), LLAMA.loss)
        loss.backward()
        lam = float(reg.metrics["lam"])
        fixed = LfURegularizer(other, auxiliary(name), lam=lam, alpha=0.05, seed=1)
        again = fixed(other, LLAMA.batch(), LLAMA.loss)
        again.backward()
        assert float(loss.detach()) == pytest.approx(float(again.detach()), rel=1e-14)
        assert_same_gradients(gradients_of(one), gradients_of(other), 1e-14)
        assert float(fixed.metrics["gradient_ratio"]) == pytest.approx(3.0, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", AUXILIARIES)
def test_ratio_after_ten_steps_in_each_precision(name: str, dtype: torch.dtype) -> None:
    """By what a step adds to plain SFT's gradient."""
    model = TINY.make().to(dtype)
    reg = LfURegularizer(model, auxiliary(name), strength=1.0)
    for step in range(FIRST_STEPS + 2):
        batch = TINY.batch(step)
        model.zero_grad()
        reg(model, dict(batch), TINY.loss).backward()
        if step >= FIRST_STEPS:
            assert part_of_lfu(TINY, model, batch) == pytest.approx(1.0, rel=0.05), step
        assert float(reg.metrics["gradient_ratio"]) == pytest.approx(1.0, rel=0.05)
        train(model)


@pytest.mark.parametrize("strategy", ["released", "retained"])
def test_every_second_step_and_a_part_of_the_batch(strategy: str) -> None:
    model = TINY.make()
    reg = LfURegularizer(
        model, "steering", strength=lambda step: 0.1 * step, alpha=0.05, every=2, batch_fraction=0.67, strategy=strategy
    )
    for step in range(6):
        model.zero_grad()
        reg(model, TINY.batch(step), TINY.loss).backward()
        wanted = 0.0 if step % 2 else 0.1 * step
        assert part_of_lfu(TINY, model, TINY.batch(step)) == pytest.approx(wanted, rel=1e-6, abs=1e-12), step


@pytest.mark.parametrize("stop", ["clean", "perturbed", "none"])
@pytest.mark.parametrize("name", AUXILIARIES)
def test_a_retained_graph(name: str, stop: Any) -> None:
    """Both gradients are taken where that is due; in between lam follows from the last of them."""
    model = TINY.make()
    reg = LfURegularizer(model, auxiliary(name), strength=RHO, alpha=0.05, strategy="retained", stop_gradient=stop)
    batch, last = TINY.batch(), 0.0
    for step in range(FIRST_STEPS + 3):
        model.zero_grad()
        reg(model, dict(batch), TINY.loss).backward()
        if step in (0, FIRST_STEPS - 1):
            sft, cons = literal(TINY, model, reg, name, batch, stop_gradient=stop)
            lam = RHO * length(sft) / length(cons)
            assert float(reg.metrics["lam"]) == pytest.approx(lam, rel=1e-8)
            assert_same_gradients(gradients_of(model), plus(sft, cons, lam), 1e-8)
        elif step > FIRST_STEPS:
            assert float(reg.metrics["lam"]) == last
        last = float(reg.metrics["lam"])
        train(model, 0.005)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", AUXILIARIES)
def test_alpha_reaches_the_displacement(name: str, dtype: torch.dtype) -> None:
    """In the middle over steps, as directions differ; in bfloat16 it aims at eight times the rounding."""
    model = LLAMA.make().to(dtype)
    aim = 1e-2 if dtype is torch.float32 else 8 * torch.finfo(dtype).eps
    reg = LfURegularizer(model, name)
    found = []
    for _ in range(FIRST_STEPS):
        model.zero_grad()
        reg(model, LLAMA.batch(), LLAMA.loss).backward()
        found.append(float(reg.metrics["relative_distance"]) / aim)
        train(model, 0.01)
    assert 1 / 3 < found[0] < 3
    assert all(1 / 4 < value < 4 for value in found)
    assert 1 / 1.5 < statistics.geometric_mean(found[1:]) < 1.5


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"auxiliary": "lora"}, {"auxiliary": "steering"}),
        ({"auxiliary": "steering"}, {"auxiliary": "steering", "displacement": 0.3}),
        ({"auxiliary": "steering"}, {"auxiliary": "steering", "layers": [-1]}),
        (
            {"auxiliary": "steering", "alpha": 1e-4, "stop_gradient": "none"},
            {"auxiliary": "steering", "alpha": 1e-2, "stop_gradient": "none"},
        ),
    ],
    ids=["auxiliary", "displacement", "layers", "alpha"],
)
def test_a_state_of_other_settings_is_measured_anew(before: dict[str, Any], after: dict[str, Any]) -> None:
    """The step and the seed go on; alpha and lam are those of a regularizer that starts there."""
    model = LLAMA.make()
    with LfURegularizer(model, **before, seed=1) as reg:
        for _ in range(FIRST_STEPS + 1):
            reg(model, LLAMA.batch(), LLAMA.loss)
        state = reg.state_dict()
    found = []
    for given in (state, {"step": state["step"], "seed": 1}):
        with LfURegularizer(model, **after, seed=2) as reg:
            reg.load_state_dict(given)
            reg(model, LLAMA.batch(), LLAMA.loss)
            found.append({name: float(reg.metrics[name]) for name in ("alpha", "lam", "relative_distance")})
            assert reg.state_dict()["step"] == FIRST_STEPS + 2
            assert reg.seed == 1
    assert found[0] == found[1]


def test_what_was_measured_goes_on_in_another_process() -> None:
    """Also where settings are functions, whose addresses differ there."""
    model, states = LLAMA.make(), []
    for _ in range(2):
        with LfURegularizer(
            model, strength=lambda step: 1 / (1 + step), token_mask=lambda batch: batch["labels"] != -100
        ) as reg:
            if states:
                reg.load_state_dict(states[0])
                assert reg.state_dict() == states[0]
            reg(model, LLAMA.batch(), LLAMA.loss)
            states.append(reg.state_dict())
    assert "alpha" in states[0]["strength"]


def test_displacement_is_relative_to_the_states() -> None:
    """The norms over all layers and all tokens that count, by hand."""
    model = TINY.make()
    reg = LfURegularizer(model, "steering", displacement=0.05)
    batch = TINY.batch()
    before = copy.deepcopy(model)
    reg(model, dict(batch), TINY.loss)
    counts = batch["labels"] != -100
    states: list[list[Tensor]] = []
    for moved in (False, True):
        seen: list[Tensor] = []

        def hook(module: Any, args: Any, output: Tensor, name: str = "", moved: bool = moved, seen: Any = seen) -> Any:
            output = output + counts.unsqueeze(-1) * reg.perturbation[name] if moved else output
            seen.append(output[counts])
            return output

        handles = [
            before.get_submodule(name).register_forward_hook(
                lambda m, a, o, name=name, hook=hook: hook(m, a, o, name=name)
            )
            for name in reg.layers
        ]
        TINY.loss(before, batch)
        for handle in handles:
            handle.remove()
        states.append(seen)
    h, h_prime = (torch.cat([state.flatten() for state in group]) for group in states)
    distance = float((h_prime - h).norm() / h.norm())
    assert float(reg.metrics["relative_distance"]) == pytest.approx(distance, rel=1e-5)
    moved = torch.cat(list(reg.perturbation.values())).norm()
    assert float(moved) == pytest.approx(reg.metrics["alpha"], rel=1e-9)
    assert 0.05 / 3 < distance < 0.05 * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 1.0, "lam": 1.0}, r"lam=1.0 and strength=1.0; allowed is one of them"),
        ({"strength": -1.0}, r"strength=-1.0; allowed are finite numbers from 0"),
        ({"strength": float("nan")}, r"strength=nan"),
        ({"strength": "much"}, r"strength='much' is a str"),
        ({"strength": True}, r"strength=True is a bool"),
        ({"displacement": 0.0}, r"displacement=0.0; allowed are numbers between 0 and 1"),
        ({"displacement": 1.0}, r"displacement=1.0"),
        ({"displacement": None}, r"displacement=None; allowed are numbers between 0 and 1\."),
    ],
    ids=str,
)
def test_what_is_not_allowed(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        LfURegularizer(TINY.make(), "steering", **options)


def test_a_callable_that_returns_nonsense() -> None:
    model = TINY.make()
    reg = LfURegularizer(model, "steering", strength=lambda step: -1.0)
    with pytest.raises(ValueError, match=r"strength\(0\)=-1.0"):
        reg(model, TINY.batch(), TINY.loss)


def test_strength_zero_is_plain_sft() -> None:
    model, calls = TINY.make(), []
    reg = LfURegularizer(model, "steering", strength=0.0)
    loss = reg(model, TINY.batch(), lambda m, b: calls.append(1) or TINY.loss(m, b))
    assert torch.equal(loss, TINY.loss(model, TINY.batch()))
    assert len(calls) == 1


def test_the_papers_settings() -> None:
    for name in AUXILIARIES:
        model = TINY.make()
        with LfURegularizer.paper(model, name) as reg:
            assert reg.settings.alpha == reg.auxiliary.default_of("alpha")
            assert reg.settings.lam == reg.auxiliary.default_of("lam")
            assert reg.settings.strength is None
        with LfURegularizer.paper(model, name, lam=2.0, every=3) as reg:
            assert (reg.settings.lam, reg.settings.every) == (2.0, 3)


@pytest.mark.parametrize("at", [3, FIRST_STEPS + 2])
@pytest.mark.parametrize("layers", ["all", "late"])
def test_a_resumed_run_continues_bit_for_bit(layers: str, at: int) -> None:
    """Among the first steps, and where alpha and the shared part's share are known from earlier ones."""

    def run(reg: LfURegularizer, model: nn.Module, steps: range) -> list[tuple[float, ...]]:
        seen = []
        for step in steps:
            model.zero_grad()
            loss = reg(model, LLAMA.batch(step), LLAMA.loss)
            loss.backward()
            seen.append((float(loss.detach()), float(reg.metrics["lam"]), float(reg.metrics["alpha"])))
            train(model)
        return seen

    model = LLAMA.make()
    whole = LfURegularizer(model, "lora", layers=layers, seed=4)
    run(whole, model, range(at))
    state, twin = whole.state_dict(), copy.deepcopy(model)
    want = run(whole, model, range(at, at + 4))
    whole.remove()
    resumed = LfURegularizer(twin, "lora", layers=layers, seed=5)
    resumed.load_state_dict(state)
    assert run(resumed, twin, range(at, at + 4)) == want
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_step_without_tokens_leaves_what_is_known() -> None:
    model = TINY.make()
    reg = LfURegularizer(model, "steering", alpha=0.05)
    reg(model, TINY.batch(), TINY.loss)
    before = reg.state_dict()["strength"]["ratio"]
    empty = {**TINY.batch(), "labels": torch.full_like(TINY.batch()["labels"], -100)}
    reg(model, empty, lambda m, b: m(b["input_ids"]).mean()).backward()
    assert float(reg.metrics["consistency_loss"]) == 0
    assert reg.state_dict()["strength"]["ratio"] == before
    model.zero_grad()
    reg(model, TINY.batch(), TINY.loss).backward()
    assert part_of_lfu(TINY, model, TINY.batch()) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.filterwarnings("ignore:LfU has no effect:lfu_reg.LfUWarning")
@pytest.mark.parametrize("name", AUXILIARIES)
@pytest.mark.parametrize("starts", ["a loss of weight zero", "a head of zeros"])
def test_states_that_stay_say_nothing_about_alpha(name: str, starts: str) -> None:
    model, batch = TINY.make(), TINY.batch()
    head = [*model.modules()][-1]
    assert isinstance(head, nn.Linear)
    weights = [weight.detach().clone() for weight in head.parameters()]
    if starts == "a head of zeros":
        for weight in head.parameters():
            weight.data.zero_()
    with LfURegularizer(model, auxiliary(name), strength=1.0, seed=0) as reg:
        for step in range(4):
            empty = step < 2
            if not empty:
                for weight, own in zip(head.parameters(), weights, strict=True):
                    weight.data.copy_(own)
            factor = 0.0 if empty and starts == "a loss of weight zero" else 1.0
            loss = reg(model, batch, lambda m, b, f=factor: f * TINY.loss(m, b))
            loss.backward()
            assert torch.isfinite(loss)
            assert bool(reg.metrics["relative_distance"] > 0) is not empty
        assert float(reg.metrics["relative_distance"]) == pytest.approx(1e-2, rel=0.3)
        assert float(reg.metrics["gradient_ratio"]) == pytest.approx(1.0, rel=1e-3)
