"""Which axis is the hidden one: blocks of convolutions, of linear maps, and of both, also where the sizes coincide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lfu_reg import LfURegularizer
from lfu_reg.model.channel_axis import channels_first

C = 6


class Conditioned(nn.Module):
    """[batch, channels, time], with a linear map for a condition."""

    def __init__(self, condition: int = 4, factor: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(C, C * factor, 3, padding=1)
        self.condition = nn.Linear(condition, C * factor)

    def forward(self, h: Tensor) -> Tensor:
        z = torch.ones(len(h), self.condition.in_features, dtype=h.dtype)
        changed = self.conv(h) + self.condition(z)[..., None]
        return h + torch.tanh(changed) if changed.shape == h.shape else h + torch.tanh(nn.functional.glu(changed, 1))


class FiLM(Conditioned):
    """Scale and shift from the condition: its linear map has twice the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.condition = nn.Linear(C, 2 * C)
        self.norm = nn.GroupNorm(2, C)

    def forward(self, h: Tensor) -> Tensor:
        scale, shift = self.condition(h.mean(2)).view(len(h), 2 * C, 1).chunk(2, 1)
        return h + torch.relu(self.norm(self.conv(h)) * (1 + scale) + shift)


class ConvNeXt(nn.Module):
    """[batch, channels, height, width], with linear maps and a norm inside that run channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, padding=1, groups=C)
        self.norm, self.up, self.down = nn.LayerNorm(C), nn.Linear(C, 2 * C), nn.Linear(2 * C, C)

    def forward(self, h: Tensor) -> Tensor:
        inside = self.norm(self.conv(h).permute(0, 2, 3, 1))
        return h + self.down(torch.relu(self.up(inside))).permute(0, 3, 1, 2)


class Up(nn.Module):
    """A decoder's block of [batch, channels, height, width]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.ConvTranspose2d(C, C, 3, padding=1), nn.BatchNorm2d(C)

    def forward(self, h: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(h)))


class Dense(nn.Module):
    """What it got beside what it made of it: more channels than any convolution has."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(C, 2, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        return torch.cat([h, self.conv(h)], 1)


class Mamba(nn.Module):
    """[batch, time, channels], with a convolution over time inside."""

    def __init__(self, inner: int = 2 * C) -> None:
        super().__init__()
        self.up, self.conv = nn.Linear(C, inner), nn.Conv1d(inner, inner, 3, padding=1, groups=inner)
        self.down = nn.Linear(inner, C)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.down(torch.tanh(self.conv(self.up(h).transpose(1, 2)).transpose(1, 2)))


class ConvolutionLast(nn.Module):
    """[batch, time, channels] without any linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(C, C, 3, padding=1), nn.LayerNorm(C)

    def forward(self, h: Tensor) -> Tensor:
        return h + torch.tanh(self.conv(h.mT).mT)


class ConvFeedForward(nn.Module):
    """[batch, time, channels]: attention, and convolutions for the feed-forward part (FastSpeech)."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(C, 2, batch_first=True), nn.LayerNorm(C)
        self.up, self.down = nn.Conv1d(C, 2 * C, 1), nn.Conv1d(2 * C, C, 1)

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.attention(h, h, h)[0]
        return self.norm(h + self.down(torch.relu(self.up(h.transpose(1, 2)))).transpose(1, 2))


class ImageLast(nn.Module):
    """[batch, height, width, channels], with a convolution inside."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(C, C, 3, padding=1), nn.Linear(C, C)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.linear(torch.relu(self.conv(h.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)))


def first(*spatial: int) -> tuple[int, ...]:
    return (2, C, *spatial)


def last(*spatial: int) -> tuple[int, ...]:
    return (2, *spatial, C)


LAYERS: dict[str, tuple[Callable[[], Any], Callable[..., tuple[int, ...]], int]] = {
    "condition": (Conditioned, first, 1),
    "condition of as many channels": (lambda: Conditioned(C), first, 1),
    "gated": (lambda: Conditioned(C, 2), first, 1),
    "scale and shift": (FiLM, first, 1),
    "a convolution": (lambda: nn.Conv1d(C, C, 1), first, 1),
    "ConvNeXt": (ConvNeXt, first, 2),
    "transposed": (Up, first, 2),
    "dense": (Dense, first, 3),
    "Mamba": (Mamba, last, 1),
    "Mamba without expansion": (lambda: Mamba(C), last, 1),
    "convolution over time": (ConvolutionLast, last, 1),
    "convolutions as feed-forward": (ConvFeedForward, last, 1),
    "image channels last": (ImageLast, last, 2),
}


@pytest.mark.parametrize("length", [5, C, 2 * C, 4])
@pytest.mark.parametrize("name", LAYERS)
def test_the_hidden_axis(name: str, length: int) -> None:
    """Lengths that are no size of the layer, or one of them."""
    make, shape, spatial = LAYERS[name]
    layer = make()
    output = layer(torch.randn(shape(*[length] * spatial), requires_grad=True) * 1.0)
    test = channels_first(layer)
    assert test(output) == (shape is first)
    assert test(output.detach()) == (shape is first), "pass 2 gets the answer of pass 1"


@pytest.mark.parametrize("name", LAYERS)
def test_the_hidden_axis_without_a_graph(name: str) -> None:
    make, shape, spatial = LAYERS[name]
    layer = make()
    assert channels_first(layer)(layer(torch.randn(shape(*[5] * spatial))).detach()) == (shape is first)


@pytest.mark.parametrize("dims", [2, 3])
def test_what_has_no_channels_in_front(dims: int) -> None:
    for layer in (nn.Linear(C, C), nn.LayerNorm(C), nn.LSTM(C, C), nn.Sequential(nn.Conv2d(C, C, 1))):
        assert not channels_first(layer)(torch.zeros([C] * dims))


class Functional(nn.Module):
    """A convolution whose weight is the block's own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(C, C, 3))

    def forward(self, h: Tensor) -> Tensor:
        return h + torch.tanh(nn.functional.conv1d(h, self.weight, padding=1))


@pytest.mark.parametrize("length", [9, C])
def test_a_convolution_that_is_a_function(length: int) -> None:
    layer = Functional()
    assert channels_first(layer)(layer(torch.randn(2, C, length)))
    linear = nn.ParameterList([torch.randn(C, C)])
    assert not channels_first(linear)(torch.randn(2, length, C) @ linear[0])


@pytest.mark.parametrize("time", [9, C])
def test_steering_vectors_have_a_number_per_channel(time: int) -> None:
    model = nn.Sequential(nn.Conv1d(2, C, 1), nn.Sequential(Conditioned(), Conditioned()), nn.Conv1d(C, 2, 1)).double()
    batch = torch.randn(3, 2, time, dtype=torch.float64)
    reg = LfURegularizer(model, "steering", layers=["1.0", "1.1"])
    reg(model, batch, lambda m, x: m(x).square().mean())
    clean = model[0](batch)
    per_channel = reg.perturbation["1.0"]
    assert per_channel.shape == (C,)
    moved = model[1][1](model[1][0](clean) + per_channel[:, None]) + reg.perturbation["1.1"][:, None]
    distances = per_channel.square().mean() + (moved - model[1](clean)).square().mean()
    torch.testing.assert_close(reg.metrics["consistency_loss"], (distances / 2).detach(), rtol=1e-10, atol=0)
