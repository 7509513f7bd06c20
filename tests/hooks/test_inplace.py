"""Writes into a hooked output by way of another tensor on its memory: an error, where the gradients would be wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lfu_reg import LfURegularizer
from lfu_reg.hooks.forward_pass import WriteWatch
from tests.support.cases import seeded
from tests.support.compare import assert_same_gradients, gradients_of


class Layer(nn.Module):
    """Returns a view of what it computes, or all of it, and keeps the tensor itself."""

    def __init__(self, view: bool) -> None:
        super().__init__()
        self.linear, self.view = nn.Linear(8, 8), view

    def forward(self, hidden: Tensor) -> Tensor:
        self.full = self.linear(hidden) * 2
        return self.full[..., :] if self.view else self.full


class Writing(nn.Module):
    """Writes into the first layer's tensor behind its back."""

    def __init__(self, view: bool = True, frozen: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Layer(view) for _ in range(2))
        self.scale, self.head = nn.Parameter(torch.ones(8) * 3), nn.Linear(8, 1)
        self.blocks[0].requires_grad_(not frozen)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.blocks[0](hidden)
        self.blocks[0].full.mul_(self.scale)
        return self.head(self.blocks[1](hidden))


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(batch["x"]).square().mean()


def batch() -> dict[str, Tensor]:
    return {"x": torch.randn(2, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))}


@pytest.mark.filterwarnings("ignore::lfu_reg.LfUWarning")
@pytest.mark.parametrize("strategy", ["released", "retained"])
@pytest.mark.parametrize(
    "options", [{}, {"frozen": True}, {"view": False, "frozen": True}], ids=["trained", "frozen", "no view"]
)
def test_writing_past_the_hooks_is_refused(options: dict[str, Any], strategy: str) -> None:
    model = seeded(lambda: Writing(**options)).double()
    with (
        LfURegularizer(model, "steering", strategy=strategy) as reg,
        pytest.raises(RuntimeError, match=r"wrote in place.*'blocks\.0'\. .*clone.*weights"),
    ):
        reg(model, batch(), loss)


@pytest.mark.filterwarnings("ignore::lfu_reg.LfUWarning")
def test_the_cure_that_the_message_names() -> None:
    model = seeded(Writing).double()
    loss(model, batch()).backward()
    expected = {key: gradient.clone() for key, gradient in gradients_of(model).items()}
    model.zero_grad()
    with LfURegularizer(model, "weights", lam=1e-30) as reg:
        reg(model, batch(), loss).backward()
    assert_same_gradients(gradients_of(model), expected)


@pytest.mark.parametrize("view", [True, False])
def test_a_watch_sees_writes_and_keeps_no_memory(view: bool) -> None:
    full = torch.ones(4, 4, requires_grad=True) * 1
    output = full[:2] if view else full
    watch, memory = WriteWatch("layer", output), StorageWeakRef(full.untyped_storage())
    assert not watch.was_written
    output.data.mul_(2)  # what `no_view` and `take_part` hand to the model
    assert not watch.was_written
    other = full[2:]
    del full, output
    other.mul_(2)
    assert watch.was_written
    del other
    assert memory.expired()
