"""Which modules `layers=` chooses, on every model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lfu_reg import LfURegularizer
from lfu_reg.model.layers import choose_layers
from tests.support.cases import Case, seeded
from tests.support.models import LLAMA, T5, TINY, ZOO
from tests.support.plain_models import TinyLM


def hooked(model: nn.Module, layers: Any = "all") -> tuple[str, ...]:
    with LfURegularizer(model, "steering", layers=layers) as reg:
        return reg.layers


@pytest.mark.parametrize("case", ZOO, ids=lambda c: c.name)
def test_all_finds_the_blocks(case: Case) -> None:
    assert hooked(case.make()) == case.layers


@pytest.mark.parametrize(
    ("choice", "numbers"),
    [
        (0, (0,)),
        (-1, (5,)),
        ([0, 5], (0, 5)),
        ([5, 0], (0, 5)),
        ([-1, -2], (4, 5)),
        (range(1, 3), (1, 2)),
        (slice(None, None, 2), (0, 2, 4)),
        (slice(-2, None), (4, 5)),
        ("early", (0, 1)),
        ("middle", (2, 3)),
        ("late", (4, 5)),
        ("blocks.3", (3,)),
        (["blocks.3", "blocks.1"], (1, 3)),
        (r"blocks\.[24]", (2, 4)),
        (r".*\.[01]", (0, 1)),
        (lambda name, module: type(module).__name__ == "ResidualBlock", (0, 1, 2, 3, 4, 5)),
    ],
    ids=lambda value: "callable" if callable(value) else str(value),
)
def test_choices(choice: Any, numbers: tuple[int, ...]) -> None:
    model = seeded(lambda: TinyLM(depth=6))
    assert hooked(model, choice) == tuple(f"blocks.{i}" for i in numbers)


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5, 7])
def test_thirds_cover_every_depth(depth: int) -> None:
    model = seeded(lambda: TinyLM(depth=depth))
    thirds = [hooked(model, third) for third in ("early", "middle", "late")]
    assert all(thirds)
    assert set().union(*map(set, thirds)) == set(hooked(model))
    if depth >= 3:
        assert sum(map(len, thirds)) == depth
    assert thirds[0][0] == "blocks.0"
    assert thirds[2][-1] == f"blocks.{depth - 1}"


@pytest.mark.parametrize(("depth", "lengths"), [(32, [11, 11, 10]), (4, [2, 1, 1]), (6, [2, 2, 2])])
def test_thirds_are_the_papers(depth: int, lengths: list[int]) -> None:
    model = seeded(lambda: TinyLM(depth=depth))
    assert [len(hooked(model, third)) for third in ("early", "middle", "late")] == lengths


def test_thirds_of_both_stacks() -> None:
    model = T5.make()
    early, late = hooked(model, "early"), hooked(model, "late")
    assert {name.split(".")[0] for name in early} == {name.split(".")[0] for name in late} == {"encoder", "decoder"}
    assert "decoder.block.2" in late
    assert "decoder.block.2" not in early


def test_names_may_leave_out_leading_parts() -> None:
    assert hooked(LLAMA.make(), ["layers.2"]) == ("model.layers.2",)
    assert hooked(LLAMA.make(), "layers.2.mlp") == ("model.layers.2.mlp",)


def test_any_module_can_be_a_layer() -> None:
    model = TINY.make()
    reg = LfURegularizer(model, "steering", layers=["embed", "blocks.1.up", "head"])
    reg(model, TINY.batch(), TINY.loss).backward()
    assert {name: len(d) for name, d in reg.perturbation.items()} == {"embed": 8, "blocks.1.up": 16, "head": 13}


def test_experts_and_sublayers_are_not_blocks() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(9))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + sum(expert(x) for expert in self.experts)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(2))
            self.head = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))

    assert hooked(Model()) == ("blocks.0", "blocks.1")


def test_a_stack_that_the_batch_never_runs() -> None:
    class Towers(TinyLM):
        def __init__(self) -> None:
            super().__init__()
            self.tower = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return super().forward(input_ids)

    model = seeded(Towers)
    reg = LfURegularizer(model, "steering")
    reg(model, TINY.batch(), TINY.loss).backward()
    assert set(reg.perturbation) == {"blocks.0", "blocks.1", "blocks.2"}


def test_repr_lists_the_layers() -> None:
    reg = LfURegularizer(LLAMA.make(), "steering", layers=[1, 3], alpha=0.25)
    text = repr(reg)
    for part in ("model.layers.1", "model.layers.3", "0.25", "SteeringVectors"):
        assert part in text
    assert "model.layers.2" not in text


def test_numbered_blocks_in_a_dictionary() -> None:
    blocks = {str(number): nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for number in range(3)}
    model = nn.ModuleDict({"layers": nn.ModuleDict(blocks), "head": nn.Linear(4, 2)})
    assert list(choose_layers(model)) == ["layers.0", "layers.1", "layers.2"]
    named = nn.ModuleDict({"layers": nn.ModuleDict({f"block{name}": block for name, block in blocks.items()})})
    assert "layers.block0.0" in choose_layers(named), "a name that is no number says nothing of an order"
