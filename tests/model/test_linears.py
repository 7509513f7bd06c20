"""What counts as a linear map: its sizes decide, and a name alone does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lfu_reg import LfURegularizer
from lfu_reg.model.linears import find_linears, linear_sizes

Own = type("Conv1D", (nn.Module,), {"__doc__": "A convolution over time, as audio models call it."})


def own(weight: bool) -> nn.Module:
    module = Own()
    module.conv = nn.Conv1d(4, 4, 3, padding=1)
    if weight:
        module.weight = nn.Parameter(torch.ones(4, 4, 3))
    return module


@pytest.mark.parametrize(
    ("module", "sizes"),
    [
        (nn.Linear(3, 5), (3, 5)),
        (Conv1D(5, 3), (3, 5)),
        (own(False), None),
        (own(True), None),
        (nn.Conv1d(3, 5, 1), None),
        (nn.Bilinear(3, 4, 5), None),
        (nn.Embedding(3, 5), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_sizes(module: nn.Module, sizes: tuple[int, int] | None) -> None:
    assert linear_sizes(module) == sizes
    assert (find_linears({"m": module}) == {"m": module}) == (sizes is not None)


def test_a_block_with_a_convolution_of_that_name() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.linear = own(False), nn.Linear(4, 4)

        def forward(self, h: Tensor) -> Tensor:
            return h + self.linear(torch.tanh(self.inner.conv(h.mT).mT))

    model = nn.Sequential(Block(), Block())
    reg = LfURegularizer(model, "lora")
    reg(model, torch.randn(2, 5, 4), lambda m, x: m(x).square().mean()).backward()
    assert set(reg.perturbation) == {"0.linear", "1.linear"}
