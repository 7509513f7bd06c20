"""What changes from step to step: schedules, every, batch_fraction, seeds, and resuming bit for bit."""

from __future__ import annotations

import copy
from math import comb
from typing import Any

import pytest
import torch
from torch import Tensor

from lfu_reg import LfURegularizer, LfUWarning
from tests.support.cases import seeded
from tests.support.compare import assert_same_gradients, close, gradients_of
from tests.support.harness import auxiliary
from tests.support.models import LLAMA, T5, TINY
from tests.support.plain_models import TinyLM

AUXILIARIES = ("lora", "steering", "weights", "random")


def make_auxiliary(name: str) -> Any:
    return name if name == "random" else auxiliary(name)


def test_alpha_and_lam_of_the_step_number() -> None:
    model = TINY.make()
    asked: dict[str, list[int]] = {"alpha": [], "lam": []}

    def schedule(name: str, values: list[float]) -> Any:
        def at(step: int) -> float:
            asked[name].append(step)
            return values[step]

        return at

    alphas, lams = [0.01, 0.02, 0.03], [0.5, 0.25, 0.125]
    reg = LfURegularizer(model, "steering", alpha=schedule("alpha", alphas), lam=schedule("lam", lams))
    for step in range(3):
        loss = reg(model, TINY.batch(), TINY.loss)
        length = float(torch.cat(list(reg.perturbation.values())).norm())
        assert length == pytest.approx(alphas[step], rel=1e-9)
        term = lams[step] * float(reg.metrics["consistency_loss"])
        close(loss.detach() - reg.metrics["sft_loss"], term, 1e-14)
        assert float(reg.metrics["alpha"]) == pytest.approx(alphas[step])
        assert float(reg.metrics["lam"]) == pytest.approx(lams[step])
    assert sorted(set(asked["alpha"])) == sorted(set(asked["lam"])) == [0, 1, 2]


@pytest.mark.parametrize("every", [1, 2, 3])
def test_every(every: int) -> None:
    model, calls = TINY.make(), []
    reg = LfURegularizer(model, "steering", alpha=0.1, every=every)
    plain = TINY.loss(TINY.make(), TINY.batch()).detach()
    applied = []
    for _ in range(6):
        loss = reg(model, TINY.batch(), lambda m, b: calls.append(1) or TINY.loss(m, b))
        model.zero_grad()
        loss.backward()
        applied.append(not torch.equal(loss.detach(), plain))
    assert applied == [step % every == 0 for step in range(6)]
    assert len(calls) == 6 + sum(applied)


@pytest.mark.parametrize("strategy", ["released", "retained"])
@pytest.mark.parametrize(("fraction", "size"), [(0.5, 2), (0.25, 1), (0.75, 3)])
@pytest.mark.parametrize("name", ["steering", "weights"])
def test_batch_fraction_is_unbiased(name: str, fraction: float, size: int, strategy: str) -> None:
    """The average over all subsets of the batch is the exact gradient, also with rows of unequal length."""
    model, batch = TINY.make(), TINY.batch(2, shape=(4, 7))
    counts = (batch["labels"] != -100).sum(1)
    assert len(set(counts.tolist())) > 1
    with LfURegularizer(model, make_auxiliary(name), alpha=0.05, lam=0.7) as exact:
        loss = exact(model, batch, TINY.loss)
        loss.backward()
    want_loss, want = loss.detach(), gradients_of(copy.deepcopy(model))
    want = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()

    reg = LfURegularizer(model, make_auxiliary(name), alpha=0.05, lam=0.7, batch_fraction=fraction, strategy=strategy)
    found: dict[str, tuple[Tensor, dict[str, Tensor]]] = {}
    for _ in range(80):
        drawn_anew = {name: tensor.clone() for name, tensor in batch.items()}  # the same tensors would be the same step
        loss = reg(model, drawn_anew, TINY.loss)
        key = f"{float(reg.metrics['consistency_loss']):.12e}"
        loss.backward()
        found[key] = (loss.detach(), {k: p.grad.clone() for k, p in model.named_parameters()})
        model.zero_grad()
        close(reg.metrics["sft_loss"], TINY.loss(model, batch).detach())
    assert len(found) == comb(4, size), "some subset was never drawn, or one gave two values"
    close(sum(float(loss) for loss, _ in found.values()) / len(found), want_loss)
    mean = {k: sum(g[k] for _, g in found.values()) / len(found) for k in want}
    assert_same_gradients(mean, want)


def test_batch_fraction_of_an_encoder_and_decoder() -> None:
    model = T5.make()
    reg = LfURegularizer(model, "steering", alpha=0.1, batch_fraction=0.4)
    values = set()
    for _ in range(12):
        reg(model, T5.batch(), T5.loss)
        values.add(f"{float(reg.metrics['consistency_loss']):.12e}")
    assert 1 < len(values) <= 3


def test_batch_fraction_with_dropout_is_refused() -> None:
    """Dropout of a smaller batch draws otherwise, and would be taken for a distance."""
    model = seeded(lambda: TinyLM(dropout=0.4))
    reg = LfURegularizer(model, "steering", alpha=0.0, lam=1.0, batch_fraction=0.5)
    with pytest.raises(ValueError, match=r"batch_fraction.*random numbers.*every=k"):
        reg(model, TINY.batch(2, shape=(4, 7)), TINY.loss)
    for module in model.modules():
        module.training = not isinstance(module, torch.nn.Dropout)
    reg(model, TINY.batch(2, shape=(4, 7)), TINY.loss)
    assert float(reg.metrics["consistency_loss"]) == 0
    model.train()  # later on, when nobody tries pass 2 without a perturbation any more
    with pytest.raises(ValueError, match=r"batch_fraction.*random numbers.*every=k"):
        reg(model, TINY.batch(2, shape=(4, 7)), TINY.loss)


class BatchNormed(torch.nn.Module):
    """Samples know of each other by their statistics, behind the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(6, 6) for _ in range(3))
        self.norm = torch.nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.layers
        return third(self.norm(second(torch.tanh(first(x)))))


class TimeFirst(torch.nn.Module):
    """What looks like the samples along the first dimension is time, and attends."""

    def __init__(self) -> None:
        super().__init__()
        layer = torch.nn.TransformerEncoderLayer(6, 2, 12, dropout=0.0)
        self.encoder = torch.nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


@pytest.mark.parametrize(("model", "shape"), [(BatchNormed, (6, 6)), (TimeFirst, (6, 5, 6))])
def test_batch_fraction_where_samples_are_not_apart_is_refused(model: Any, shape: Any) -> None:
    """What they would be by themselves would be taken for a distance, however small alpha is."""
    torch.manual_seed(0)
    attached = model()
    with (
        LfURegularizer(attached, "steering", alpha=1e-4, lam=1.0, batch_fraction=0.5) as reg,
        pytest.raises(ValueError, match=r"batch_fraction.*batch norm.*every=k"),
    ):
        reg(attached, {"x": torch.randn(shape)}, lambda m, b: m(b["x"]).square().mean())


def run(reg: LfURegularizer, model: Any, seeds: range, case: Any = LLAMA) -> list[Tensor]:
    """Losses and gradients of some steps of plain gradient descent."""
    found = []
    for seed in seeds:
        loss = reg(model, case.batch(seed), case.loss)
        loss.backward()
        found.append(loss.detach())
        with torch.no_grad():
            for parameter in model.parameters():
                found.append(parameter.grad.clone())
                parameter -= 0.01 * parameter.grad
        model.zero_grad()
    return found


@pytest.mark.parametrize("options", [{}, {"batch_fraction": 0.67}, {"every": 2}], ids=["plain", "fraction", "every"])
@pytest.mark.parametrize("name", AUXILIARIES)
def test_resume_bit_for_bit(name: str, options: dict[str, Any]) -> None:
    lam = lambda step: 0.5 / (1 + step)  # noqa: E731
    model = LLAMA.make()
    with LfURegularizer(model, make_auxiliary(name), lam=lam, **options) as reg:
        through = run(reg, model, range(5))
    model = LLAMA.make()
    with LfURegularizer(model, make_auxiliary(name), lam=lam, **options) as reg:
        first = run(reg, model, range(3))
        state = copy.deepcopy(reg.state_dict())
    torch.manual_seed(999)  # another process
    resumed = copy.deepcopy(model)
    with LfURegularizer(resumed, make_auxiliary(name), lam=lam, **options) as reg:
        reg.load_state_dict(state)
        second = run(reg, resumed, range(3, 5))
    for one, other in zip(through, first + second, strict=True):
        assert torch.equal(one, other)


def test_state_can_be_saved() -> None:
    import io

    reg = LfURegularizer(TINY.make(), "lora", seed=4)
    buffer = io.BytesIO()
    torch.save(reg.state_dict(), buffer)
    buffer.seek(0)
    reg.load_state_dict(torch.load(buffer, weights_only=True))


@pytest.mark.parametrize("name", AUXILIARIES)
def test_seeds(name: str) -> None:
    def losses(seed: int | None, global_seed: int = 0) -> list[Tensor]:
        torch.manual_seed(global_seed)
        model = TINY.make()
        with LfURegularizer(model, make_auxiliary(name), seed=seed) as reg:
            return [x for x in run(reg, model, range(3), TINY) if x.dim() == 0]

    assert losses(1) == losses(1)
    assert losses(1, 5) == losses(1, 6), "the seed alone decides"
    assert losses(None, 5) == losses(None, 5), "without a seed the global one decides"
    if name in ("lora", "random"):
        assert losses(1) != losses(2)
        assert losses(None, 5) != losses(None, 6)


def test_a_failed_step_is_not_counted() -> None:
    model = TINY.make()
    reg = LfURegularizer(model, "lora", seed=3)
    reg(model, TINY.batch(), TINY.loss)
    before = reg.state_dict()
    with pytest.raises(ZeroDivisionError):
        reg(model, TINY.batch(), lambda m, b: 1 / 0)
    assert reg.state_dict() == before


def test_eval_steps_are_not_counted() -> None:
    model = TINY.make()
    reg = LfURegularizer(model, "lora", seed=3)
    reg(model, TINY.batch(), TINY.loss)
    before = reg.state_dict()
    with torch.no_grad():
        reg(model, TINY.batch(), TINY.loss)
    model.eval()
    with pytest.warns(LfUWarning, match="eval mode"):
        reg(model, TINY.batch(), TINY.loss)
    assert reg.state_dict() == before


def observed(reg: LfURegularizer, model: Any, steps: range) -> list[int]:
    """The steps at which the relative distance was measured; every regularized one calls the loss exactly twice."""
    calls: list[int] = []
    measured = []
    for step in steps:
        before = reg.metrics.get("relative_distance")
        calls.clear()
        reg(model, TINY.batch(), lambda m, b: calls.append(1) or TINY.loss(m, b))
        assert len(calls) == 1 + ("ascent_grad_norm" in reg.metrics), step
        measured += [step] * (reg.metrics.get("relative_distance") is not before)
    return measured


WHEN: dict[str, tuple[dict[str, Any], list[int]]] = {
    "always": ({}, [*range(11), *range(20, 101, 10)]),
    "every=2": ({"every": 2}, [*range(0, 21, 2), *range(40, 101, 20)]),
    "every=3": ({"every": 3}, [*range(0, 31, 3), 60, 90]),
    "warm-up": ({"lam": lambda step: 0.1 * (step >= 7)}, [*range(7, 17), *range(20, 101, 10)]),
    "off when due": ({"lam": lambda step: 0.1 * (step % 10 > 0)}, [*range(1, 10), 11]),
}


@pytest.mark.parametrize(("options", "measured"), WHEN.values(), ids=WHEN)
def test_looks_go_by_the_regularized_steps(options: dict[str, Any], measured: list[int]) -> None:
    model = TINY.make()
    """The first ten, and every tenth."""
    assert observed(LfURegularizer(model, "steering", alpha=0.1, **options), model, range(101)) == measured


@pytest.mark.parametrize(("options", "measured"), WHEN.values(), ids=WHEN)
def test_a_resumed_run_looks_where_an_uninterrupted_one_does(options: dict[str, Any], measured: list[int]) -> None:
    """Also where it is resumed among the first ones."""
    for at in (4, 40):
        model = TINY.make()
        before = LfURegularizer(model, "steering", alpha=0.1, **options)
        first = observed(before, model, range(at))
        before.remove()
        reg = LfURegularizer(model, "steering", alpha=0.1, **options)
        reg.load_state_dict(before.state_dict())
        assert first + observed(reg, model, range(at, 101)) == measured
        reg.remove()
