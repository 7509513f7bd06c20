"""Models without repeated blocks: their single layers are chosen, with one message; stages of one block are named."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from lfu_reg import LfURegularizer, LfUWarning, LoRADeltas, SteeringVectors
from lfu_reg.model.layers import choose_layers
from tests.support.cases import seeded
from tests.support.models import ZOO


class Net(nn.Module):
    """A model of named modules, called in the order in which they are given."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        for module in self.children():
            x = module(x)
            x = x[0] if isinstance(x, tuple) else x
        return x


class GraphConvolution(nn.Module):
    """Mixes the nodes of a graph; its weight is a parameter of its own."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(n_in, n_out)), nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.roll(x, 1, 0) @ self.weight + self.bias


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.mean, self.log_variance = nn.Linear(6, 5), nn.Linear(5, 2), nn.Linear(5, 2)
        self.fc3, self.fc4 = nn.Linear(2, 5), nn.Linear(5, 6)
        self.scale = nn.Parameter(torch.ones(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.fc1(x))
        h = self.mean(h) + self.log_variance(h).exp() * 0.1
        return self.fc4(torch.relu(self.fc3(h)))


def cnn() -> nn.Module:
    return Net(
        conv1=nn.Conv2d(1, 3, 3), norm=nn.BatchNorm2d(3), act=nn.PReLU(3), conv2=nn.Conv2d(3, 4, 3), flat=nn.Flatten(),
        fc1=nn.Linear(16, 5), fc2=nn.Linear(5, 2),
    )  # fmt: skip


def image() -> Tensor:
    return torch.randn(2, 1, 6, 6, dtype=torch.float64)


def vectors() -> Tensor:
    return torch.randn(4, 6, dtype=torch.float64)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], tuple[str, ...]]] = {
    "CNN": (cnn, image, ("conv1", "conv2", "fc1")),
    "LSTM language model": (
        lambda: Net(embed=nn.Embedding(9, 4), rnn=nn.LSTM(4, 4, 2), decoder=nn.Linear(4, 9)),
        lambda: torch.randint(9, (5, 2)),
        ("rnn",),
    ),
    "GCN": (
        lambda: Net(conv1=GraphConvolution(6, 4), conv2=GraphConvolution(4, 4), conv3=GraphConvolution(4, 2)),
        vectors,
        ("conv1", "conv2"),
    ),
    "VAE": (Autoencoder, vectors, ("fc1", "mean", "log_variance", "fc3")),
    "nested": (
        lambda: Net(body=Net(inner=nn.Linear(6, 4), act=nn.Tanh(), outer=nn.Linear(4, 4)), head=nn.Linear(4, 2)),
        vectors,
        ("body.inner", "body.outer"),
    ),
    "parametrized": (
        lambda: Net(one=weight_norm(nn.Linear(6, 4, bias=False)), two=weight_norm(nn.Linear(4, 2))),
        vectors,
        ("one",),
    ),
    "attention": (
        lambda: Net(up=nn.Linear(6, 4), attend=Attention(), head=nn.Linear(4, 2)),
        lambda: vectors()[None],
        ("up", "attend.inner"),
    ),
}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x)[0]


@pytest.mark.parametrize("auxiliary", ["steering", "weights"])
@pytest.mark.parametrize("name", MODELS)
def test_single_layers(name: str, auxiliary: str) -> None:
    make, batch, layers = MODELS[name]
    model = seeded(make)
    with pytest.warns(LfUWarning, match="no repeated blocks") as said:
        reg = LfURegularizer(model, auxiliary)
    for _ in range(2):
        reg(model, batch(), lambda m, x: m(x).square().mean()).backward()
    assert reg.layers == layers
    assert len(said) == 1
    assert all(layer in str(said[0].message) for layer in (type(model).__name__, *layers, "layers=[...]"))
    assert float(reg.metrics["consistency_loss"]) > 0


def test_positions_among_single_layers() -> None:
    model = cnn()
    choices: dict[Any, tuple[str, ...]] = {0: ("conv1",), -1: ("fc1",), "early": ("conv1",), "late": ("fc1",)}
    for choice, layers in choices.items():
        assert tuple(choose_layers(model, choice)) == layers
    assert list(choose_layers(model, slice(1, None))) == ["conv2", "fc1"]


def test_named_layers_need_no_message() -> None:
    with LfURegularizer(cnn(), "steering", layers=["conv1"]) as reg:
        assert reg.layers == ("conv1",)


def test_lora_on_single_layers() -> None:
    with pytest.warns(LfUWarning), LfURegularizer(cnn(), "lora") as reg:
        assert reg.layers == ("conv1", "conv2", "fc1")
    model = Net(conv1=nn.Conv2d(1, 3, 3), conv2=nn.Conv2d(3, 4, 3), flat=nn.Flatten(), head=nn.Linear(16, 2))
    with pytest.warns(LfUWarning), pytest.raises(ValueError, match='auxiliary="steering"'):
        LfURegularizer(model, LoRADeltas())


@pytest.mark.parametrize("asked", [(), ("lora",), ("LoRA",)])
def test_steering_takes_the_place_of_lora_without_linear_maps(asked: tuple[Any, ...]) -> None:
    model = Net(conv1=nn.Conv2d(1, 3, 3), conv2=nn.Conv2d(3, 4, 3), flat=nn.Flatten(), head=nn.Linear(16, 2))
    with (
        pytest.warns(LfUWarning, match="repeated blocks"),
        pytest.warns(LfUWarning, match=r"\(conv1, conv2\) have no linear map"),
        LfURegularizer(model, *asked) as reg,
    ):
        assert isinstance(reg.auxiliary, SteeringVectors)
    with pytest.warns(LfUWarning) as told, LfURegularizer(model, "steering"):
        assert len(told) == 1


def stage(blocks: int) -> nn.Module:
    return nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(blocks)))


def told(model: nn.Module, layers: Any = "all") -> list[str]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        LfURegularizer(model, "steering", layers=layers).remove()
    return [str(warning.message) for warning in said]


@pytest.mark.parametrize("layers", ["all", "late"])
def test_stages_of_one_block_are_named(layers: str) -> None:
    model = Net(layer1=stage(2), layer2=stage(1), inner=Net(layer3=nn.ModuleList(stage(1))), head=nn.Linear(4, 2))
    (message,) = told(model, layers)
    assert "layer2.0, inner.layer3.0" in message
    assert f"layers={layers!r}" in message
    assert told(model, r"layer[12]\.\d|inner\.layer3\.0") == []
    assert told(model, 0) == []


@pytest.mark.parametrize(
    "other",
    [
        nn.Sequential(nn.Linear(4, 4)),
        nn.Sequential(nn.Dropout(), nn.Linear(4, 2)),
        nn.ModuleList([nn.LSTM(4, 4)]),
        nn.Sequential(nn.Tanh()),
    ],
    ids=lambda m: str(m).replace("\n", ""),
)
def test_what_is_no_stage_is_not_named(other: nn.Module) -> None:
    assert told(Net(layer1=stage(2), other=other)) == []


@pytest.mark.parametrize("case", ZOO, ids=lambda c: c.name)
def test_nothing_is_said_of_models_with_blocks_alone(case: Any) -> None:
    assert told(case.make()) == []
