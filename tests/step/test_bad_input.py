"""Bad input: an error before anything is trained, which says what was given, what is allowed, and the cure."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, get_args, get_type_hints

import pytest
from torch import nn

from lfu_reg import LfURegularizer, LoRADeltas, RandomDirections, SteeringVectors, auxiliaries, distances, regularizer
from lfu_reg.auxiliaries import AuxiliaryName
from lfu_reg.distances import DistanceName
from lfu_reg.step.settings import StrategyName
from tests.support.cases import seeded
from tests.support.models import TINY
from tests.support.plain_models import LSTMStack, TinyCNN
from tests.support.refusals import refuses, refuses_step


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.embed = nn.Linear(3, 3), nn.LayerNorm(3), nn.Embedding(3, 3)


@pytest.mark.parametrize("make", [Flat, lambda: nn.Sequential(Flat(), nn.ReLU()), nn.ReLU, lambda: nn.Linear(3, 2)])
@pytest.mark.parametrize("layers", ["all", "late", 0])
def test_no_layer_before_the_output(make: Callable[[], nn.Module], layers: Any) -> None:
    model = make()
    cure = ("layers=['...']", "first") if list(model.children()) else ("no submodules", "nn.ModuleList")
    refuses(model, (type(model).__name__, *cure, "whole model"), "steering", layers=layers)


def test_a_name_in_a_model_without_submodules() -> None:
    refuses(nn.ReLU(), ("ReLU has no submodules",), "steering", layers="first")


def test_the_one_layer_by_name() -> None:
    with LfURegularizer(Flat(), "steering", layers=["first"]) as reg:
        assert reg.layers == ("first",)


@pytest.mark.parametrize(
    ("choice", "parts"),
    [
        ("blocks.9", ("blocks.9", "blocks.0", "blocks.2")),
        (r"decoder\.\d+", ("decoder", "blocks.0")),
        (["blocks.0", "nope"], ("nope", "blocks.0")),
        ([7], ("7", "3", "blocks.0")),
        (-9, ("-9", "blocks.0")),
        (slice(5, 9), ("slice", "3")),
        ([], ("[]",)),
        (lambda name, module: False, ("callable", "blocks.0")),
        ("(", ("(", "regular expression")),
        (1.5, ("1.5", "index")),
        (True, ("True", "index")),
        (None, ("None", "index")),
        ("block.1", ("block.1", "did you mean 'blocks.1' or 'blocks.2' or 'blocks.0'?")),
        (["blocks.0", "blocks.1.upp"], ("layers='blocks.1.upp'", "did you mean 'blocks.1.up'")),
        ("lat", ("did you mean 'late'", "its blocks are blocks.0 to blocks.2 (3)")),
        (nn.Linear(1, 1), ("layers=Linear(", "the name of a module (not the module)")),
        (nn.ModuleList([nn.Linear(1, 1)]), ("layers=[Linear(", "not the module")),
    ],
    ids=lambda value: "callable" if callable(value) else str(value),
)
def test_layers_that_match_nothing(choice: Any, parts: tuple[str, ...]) -> None:
    refuses(TINY.make(), parts, "steering", layers=choice)


@pytest.mark.parametrize("setting", ["alpha", "lam"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), "0.1", [0.1], True])
def test_alpha_and_lam(setting: str, value: Any) -> None:
    refuses(TINY.make(), (setting, str(value), "number"), "steering", **{setting: value})


@pytest.mark.parametrize("setting", ["alpha", "lam"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), "0.1", None])
def test_alpha_and_lam_from_a_schedule(setting: str, value: Any) -> None:
    model = TINY.make()
    reg = LfURegularizer(model, "steering", **{setting: lambda step: value})
    refuses_step((setting, str(value), "number"), model=model, reg=reg)


@pytest.mark.parametrize(
    ("setting", "value", "allowed"),
    [
        ("reduction", "max", "mean"),
        ("distance", "l1", "mse"),
        ("distance", 3, "mse"),
        ("stop_gradient", "both", "perturbed"),
        ("strategy", "fast", "released"),
        ("auxiliary", "lorra", "did you mean 'lora'?"),
        ("auxiliary", "steer", "did you mean 'steering'?"),
        ("auxiliary", 3, "lora"),
        ("distance", "cosin", "did you mean 'cosine'?"),
        ("stop_gradient", "clear", "did you mean 'clean'?"),
        ("strategy", "retain", "did you mean 'retained'?"),
        ("sync_perturbation", "yes", "True, False"),
        ("ascent_steps", 0, "1"),
        ("ascent_steps", 1.5, "1"),
        ("every", 0, "1"),
        ("batch_fraction", 0.0, "1"),
        ("batch_fraction", 1.5, "1"),
        ("batch_fraction", float("nan"), "1"),
        ("seed", "abc", "whole numbers"),
        ("seed", 1.5, "whole numbers"),
    ],
)
def test_other_settings(setting: str, value: Any, allowed: str) -> None:
    refuses(TINY.make(), (str(value), allowed), **{setting: value})


def test_ranks_that_nothing_is_averaged_over() -> None:
    refuses(TINY.make(), ("process_group", "sync_perturbation=True"), process_group=object())


def test_names_in_any_case() -> None:
    names = {"auxiliary": "LoRA", "distance": "MSE", "reduction": "Sum", "stop_gradient": "Clean", "strategy": "Auto "}
    with LfURegularizer(TINY.make(), layers="Late", leave_early="AUTO", **names) as reg:  # type: ignore[arg-type]
        assert isinstance(reg.auxiliary, LoRADeltas)
        assert reg.layers == ("blocks.2",)
        assert (reg.settings.reduction, reg.settings.strategy, reg.settings.leave_early) == ("sum", "auto", "auto")
    assert SteeringVectors(norm="Per-Layer").norm == "per-layer"  # type: ignore[arg-type]


def test_type_checkers_see_names() -> None:
    parameters = inspect.signature(LfURegularizer).parameters
    hints = get_type_hints(LfURegularizer.__init__, {**vars(regularizer), "ProcessGroup": object})
    for name, kind in {"auxiliary": AuxiliaryName, "distance": DistanceName, "strategy": StrategyName}.items():
        assert kind in (hints[name], *get_args(hints[name])), name
        assert parameters[name].default in get_args(kind)
    assert set(get_args(AuxiliaryName)) == set(auxiliaries._BY_NAME)
    assert set(get_args(DistanceName)) == set(distances._BY_NAME)


def test_a_class_where_an_object_is_asked_for() -> None:
    refuses(TINY.make(), ("auxiliary=LoRADeltas;", "instantiate it, LoRADeltas()"), LoRADeltas)
    refuses(TINY.make(), ("distance=Cosine;", "Cosine()"), distance=distances.Cosine)
    with pytest.raises(TypeError, match="the class Flat"):
        LfURegularizer(Flat)  # type: ignore[arg-type]


def test_model_and_auxiliary_swapped() -> None:
    model: Any = TINY.make()
    with pytest.raises(TypeError, match=r"the model comes first, LfURegularizer\(model, auxiliary\)") as caught:
        LfURegularizer("lora", model)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 400  # and not the pages of a model's repr


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: SteeringVectors(norm="local"), "per-layer"),
        (lambda: SteeringVectors(tokens="some"), "masked"),
        (lambda: LoRADeltas(rank=0), "rank"),
        (lambda: LoRADeltas(rank=2.5), "rank"),
        (lambda: LoRADeltas(lora_alpha=-1), "lora_alpha"),
        (lambda: RandomDirections("lora"), "LoRADeltas"),
    ],
)
def test_auxiliaries_settings(make: Callable[[], Any], part: str) -> None:
    with pytest.raises((ValueError, TypeError), match=part):
        make()


def test_no_linear_map_to_act_on() -> None:
    refuses(seeded(LSTMStack), ("lora", "linear", "steering"), LoRADeltas())
    refuses(seeded(TinyCNN), ("lora", "linear", "steering"), LoRADeltas())


@pytest.mark.parametrize("target", ["nope", ["nope"], r"blocks\.7\..*"])
def test_target_modules_that_match_nothing(target: Any) -> None:
    asked = "nope" if "nope" in target else "7"
    refuses(TINY.make(), ("target_modules", asked, "up", "down"), LoRADeltas(target_modules=target))


def test_target_modules_of_a_wrong_kind() -> None:
    refuses(TINY.make(), ("target_modules", "all-linear"), LoRADeltas(target_modules=3))
