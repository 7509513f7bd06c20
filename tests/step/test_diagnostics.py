"""The paper's failure signatures: one warning each, with the cure; no false alarm; figures in the metrics."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from lfu_reg import LfURegularizer, LfUWarning, SteeringVectors
from lfu_reg.step.strength import FIRST_STEPS
from tests.support.cases import seeded
from tests.support.models import FROZEN, LLAMA, TINY
from tests.support.plain_models import TinyLM

STEPS = 120


def warnings_of(
    reg: LfURegularizer, model: Any, steps: int = STEPS, loss: Any = TINY.loss, rate: float = 0.0
) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(steps):
            model.zero_grad()
            reg(model, TINY.batch(seed % 3), loss).backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter -= rate * parameter.grad
    return [str(w.message) for w in caught if issubclass(w.category, LfUWarning)]


@pytest.mark.parametrize("name", ["lora", "steering", "weights", "random"])
def test_a_healthy_run_is_silent(name: str) -> None:
    model = TINY.make()
    assert warnings_of(LfURegularizer(model, name, alpha=0.05, lam=1.0), model, rate=0.02) == []


def test_negligible_term() -> None:
    model = TINY.make()
    told = warnings_of(LfURegularizer(model, "steering", alpha=1e-5, lam=0.1), model)
    assert len(told) == 1
    assert "no effect" in told[0]
    assert "strength=1, or lam=" in told[0]
    assert "instead of lam=0.1" in told[0]


def off_at_looks(step: int) -> float:
    return 0.0 if step == 0 or (step + 1) % 50 == 0 else 1e-20


SKIPPING: dict[str, dict[str, Any]] = {
    **{f"every={every}": {"every": every, "lam": 1e-20} for every in (2, 3, 4, 5, 10)},
    "lam=0": {"lam": off_at_looks},
}


@pytest.mark.parametrize("options", SKIPPING.values(), ids=SKIPPING)
def test_steps_that_are_left_out_do_not_blind_it(options: dict[str, Any]) -> None:
    """It looks at every 50th regularized step, whichever number that has."""
    model = TINY.make()
    reg = LfURegularizer(model, "steering", alpha=0.05, **options)
    told: list[str] = []
    measured: list[Any] = []
    every = options.get("every", 1)
    for step in range(52 * every if every > 1 else 152):
        told += warnings_of(reg, model, 1)
        distance = reg.metrics.get("relative_distance")
        assert distance is not None or step == 0
        if distance is not None and not any(distance is before for before in measured):
            measured.append(distance)
        assert len(reg._diagnostics._window) < 50
    assert len(told) == 1
    assert "lam" in told[0]
    assert len(measured) >= 2


class NormalisedLM(TinyLM):
    """Batch normalisation right after every block takes out a steering vector, whatever it is."""

    def __init__(self) -> None:
        super().__init__(batch_norm=True)

    def body(self, hidden: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden = self.batch_norms[0](block(hidden).flatten(0, 1)).view_as(hidden)
        return hidden


def test_a_gradient_of_rounding() -> None:
    model = seeded(NormalisedLM)
    whole = SteeringVectors(tokens="all")
    told = warnings_of(LfURegularizer(model, whole, alpha=0.05), model, 2)
    assert len(told) == 1
    assert "rounding" in told[0]
    assert "batch norm" in told[0]


def test_zero_gradient() -> None:
    """The chosen layers do not influence the loss."""
    model = TINY.make()

    def loss(m: Any, batch: Any) -> torch.Tensor:
        m(batch["input_ids"])
        hidden = m.embed(batch["input_ids"])
        return m.head(hidden).square().mean() + 0.0 * m(batch["input_ids"]).sum()

    told = warnings_of(LfURegularizer(model, "steering"), model, 2, loss)
    assert len(told) == 1
    assert "zero" in told[0]
    assert "layers" in told[0]


def test_collapse() -> None:
    model = TINY.make()
    told = warnings_of(LfURegularizer(model, "steering", alpha=500.0), model)
    assert len(told) == 1
    assert "alpha" in told[0]


def test_oscillation() -> None:
    """The two terms swing against each other."""
    model = TINY.make()
    state = {"step": 0}

    def alpha(step: int) -> float:
        state["step"] = step
        return 0.05 if step % 2 else 0.2

    def loss(m: Any, batch: Any) -> torch.Tensor:
        return TINY.loss(m, TINY.batch(0)) * (3.0 if state["step"] % 2 else 1.0)

    told = warnings_of(LfURegularizer(model, "steering", alpha=alpha, lam=10.0), model, loss=loss)
    assert any("lam" in message or "learning rate" in message for message in told)
    assert len(told) == 1


def test_no_trainable_weight_before_the_layers() -> None:
    model = FROZEN.make()
    reg = LfURegularizer(model, "steering", layers=[0])
    with pytest.warns(LfUWarning, match="layers"):
        reg(model, FROZEN.batch(), FROZEN.loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reg(model, FROZEN.batch(), FROZEN.loss).backward()


def test_two_regularizers_warn_each_for_itself() -> None:
    for _ in range(2):
        model = FROZEN.make()
        with LfURegularizer(model, "steering", layers=[0]) as reg, pytest.warns(LfUWarning):
            reg(model, FROZEN.batch(), FROZEN.loss)


def test_metrics() -> None:
    model = LLAMA.make()
    reg = LfURegularizer(model, "steering", alpha=0.05, lam=0.3)
    loss = reg(model, LLAMA.batch(), LLAMA.loss)
    metrics = reg.metrics
    assert isinstance(metrics, Mapping)
    wanted = {"loss", "sft_loss", "consistency_loss", "ascent_grad_norm", "relative_distance", "alpha", "lam"}
    assert wanted | {f"distance/{name}" for name in reg.layers} <= set(metrics)
    for key, value in metrics.items():
        if isinstance(value, torch.Tensor):
            assert value.dim() == 0, key
            assert not value.requires_grad, key
        assert float(value) == float(value), key
    assert float(metrics["loss"]) == float(loss.detach())
    expected = float(metrics["sft_loss"]) + 0.3 * float(metrics["consistency_loss"])
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-14)
    per_layer = [float(metrics[f"distance/{name}"]) for name in reg.layers]
    assert float(metrics["consistency_loss"]) == pytest.approx(sum(per_layer) / 4, rel=1e-12)
    assert per_layer[0] < per_layer[-1], "the perturbations of the layers below add up"
    assert 0 < float(metrics["relative_distance"]) < 1


def test_metrics_are_of_the_last_step() -> None:
    model = TINY.make()
    reg = LfURegularizer(model, "steering")
    values = []
    for seed in range(3):
        loss = reg(model, TINY.batch(seed), TINY.loss)
        assert float(reg.metrics["loss"]) == float(loss.detach())
        values.append(float(reg.metrics["loss"]))
    assert len(set(values)) == 3


def test_no_number_is_read_on_the_way() -> None:
    """After the first steps, nothing waits for the device: no .item() and the like where nothing is measured."""
    model = TINY.make()
    reg = LfURegularizer(model, "steering")
    batch = TINY.batch()
    for _ in range(FIRST_STEPS + 1):
        reg(model, batch, TINY.loss)
    read: list[Any] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "_local_scalar_dense" in str(func):
                read.append(func)
            return func(*args, **(kwargs or {}))

    with Watch():
        reg(model, batch, TINY.loss).backward()
    assert read == []


def test_a_forward_that_does_not_repeat_is_told_once_and_tried_again_ever_more_rarely() -> None:
    """Its steps are plain SFT."""
    model = TINY.make()
    own = torch.Generator().manual_seed(3)  # no generator that could be put back

    def noise(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + 0.1 * torch.randn(output.shape, generator=own, dtype=output.dtype)

    handle = model.embed.register_forward_hook(noise)
    calls: list[int] = []

    def counted(model: Any, batch: Any) -> torch.Tensor:
        calls.append(1)
        return TINY.loss(model, batch)

    with LfURegularizer(model, "steering", alpha=0.05) as reg:
        own.manual_seed(3)
        first = warnings_of(reg, model, steps=1, loss=counted)
        assert len(first) == 1
        assert "plain SFT" in first[0]
        assert "the input of blocks.0's call 1 differs" in first[0]
        got = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        own.manual_seed(3)
        TINY.loss(model, TINY.batch(0)).backward()
        assert all(torch.equal(p.grad, got[name]) for name, p in model.named_parameters())
        often = [len(calls)]
        for _ in range(14):
            calls.clear()
            assert warnings_of(reg, model, steps=1, loss=counted) == []
            often.append(len(calls))
        assert [step for step, number in enumerate(often) if number == 2] == [0, 2, 6, 14]
        assert reg.metrics["unrepeatable_steps"] == 4
        handle.remove()
        for _ in range(20):
            reg(model, TINY.batch(), TINY.loss)
        assert "ascent_grad_norm" in reg.metrics, "it repeats by now"


@pytest.mark.parametrize("where", ["before a step", "in a step", "at the figures"])
def test_warnings_name_the_users_line(where: str) -> None:
    """However deep in the package they come from: Python then shows that line, and filters by module work."""
    model = TINY.make()
    reg = LfURegularizer(model, "steering", alpha=0.1, lam=1e-30 if where == "at the figures" else None)
    model.train(where != "before a step")
    if where == "in a step":
        model.requires_grad_(False)
        model.head.requires_grad_(True)

    def steps() -> None:
        for _ in range(50):
            reg(model, TINY.batch(), TINY.loss)

    with pytest.warns(LfUWarning) as told:
        steps()
    assert {warning.filename for warning in told} == {__file__}


# ------------------------------------------------------------------ how strong it is, at the first steps


def told_of_strength(reg: LfURegularizer, model: Any, steps: int = 3, case: Any = TINY) -> list[str]:
    """Warnings of the first steps."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(steps):
            reg(model, case.batch(seed), case.loss).backward()
            model.zero_grad()
    return [str(w.message) for w in caught if issubclass(w.category, LfUWarning)]


@pytest.mark.parametrize("name", ["lora", "steering", "weights"])
def test_the_defaults_are_silent(name: str) -> None:
    for model in (TINY.make(), TINY.make().float(), TINY.make().bfloat16()):
        assert told_of_strength(LfURegularizer(model, name), model, steps=12) == []


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (
            {"strength": 1e-4},
            ("no effect", "1.0e-04 of that of the SFT loss", "Use strength=1 instead of strength=0.0001"),
        ),
        ({"strength": 50.0}, ("outweighs", "50 times as long", "Use strength=1 instead of strength=50.0")),
        ({"lam": 1e-6, "alpha": 0.05}, ("no effect", "Use strength=1, or lam=", "instead of lam=1e-06")),
        ({"lam": 1e8, "alpha": 0.05}, ("outweighs", "Use strength=1, or lam=", "instead of lam=1e+08")),
    ],
    ids=str,
)
def test_too_little_and_too_much_are_told_at_the_first_step(options: dict[str, Any], parts: tuple[str, ...]) -> None:
    model = TINY.make()
    reg = LfURegularizer(model, "steering", **options)
    (message,) = told_of_strength(reg, model, steps=1)
    assert all(part in message for part in parts), message
    assert told_of_strength(reg, model) == []


def test_the_lam_that_is_proposed_has_the_strength_one() -> None:
    model = TINY.make()
    with LfURegularizer(model, "steering", alpha=0.05, lam=1e8) as reg:
        (message,) = told_of_strength(reg, model, steps=1)
    lam = float(message.split("or lam=")[1].split()[0])
    with LfURegularizer(model, "steering", alpha=0.05, lam=lam) as reg:
        assert told_of_strength(reg, model, steps=1) == []
        assert float(reg.metrics["gradient_ratio"]) == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize("name", ["lora", "steering", "weights"])
def test_collapse_is_told_with_a_cure(name: str) -> None:
    model = TINY.make()
    with LfURegularizer(model, name, alpha=1e6, seed=1) as reg:
        (message,) = told_of_strength(reg, model, steps=1)
    assert "collapses the model" in message
    assert "alpha=1e+06 is too large for this model. Give strength and leave alpha out" in message
    with LfURegularizer(model, name, strength=1.0, seed=1) as reg:
        assert told_of_strength(reg, model, steps=1) == []
        assert 1e-2 / 3 < float(reg.metrics["relative_distance"]) < 3e-2


@pytest.mark.parametrize("name", ["lora", "steering", "weights"])
def test_rounding_noise_is_told_with_a_cure(name: str) -> None:
    model = LLAMA.make().bfloat16()
    with LfURegularizer(model, name, alpha=1e-5, seed=1) as reg:
        told = told_of_strength(reg, model, steps=1, case=LLAMA)
    (message,) = (m for m in told if "measures rounding" in m)
    assert "rounds by 7.8e-03: alpha=1e-05 is too small for this model. Give strength and leave alpha out" in message
    with LfURegularizer(model, name, strength=1.0, seed=1) as reg:
        assert told_of_strength(reg, model, steps=1, case=LLAMA) == []
        assert 0.0625 / 3 < float(reg.metrics["relative_distance"]) < 3 * 0.0625


def test_batches_without_tokens_say_nothing_of_strength() -> None:
    """Their ratio is zero, whatever the settings."""
    model = TINY.make()
    reg = LfURegularizer(model, "steering", alpha=0.05)

    def loss(m: Any, batch: Any) -> torch.Tensor:
        return m(batch["input_ids"]).mean()

    batch = {**TINY.batch(), "labels": torch.full_like(TINY.batch()["labels"], -100)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            reg(model, batch, loss).backward()
    assert not any("gradient of lam" in str(w.message) or "measures rounding" in str(w.message) for w in caught)
    assert reg.metrics["empty_steps"] == 3


def test_a_ratio_that_grows_is_told_when_it_is_measured_again() -> None:
    """Not at the first steps alone."""
    model = TINY.make()
    reg = LfURegularizer(model, "steering", alpha=0.05, lam=lambda step: 1e8 if step > 15 else 300.0)
    assert told_of_strength(reg, model, steps=16) == []
    (message,) = told_of_strength(reg, model, steps=6)
    assert "outweighs" in message
