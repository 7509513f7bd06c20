"""What a forward pass is seen to have written to, and buffers that are copies for a while."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from lfu_reg.model.buffers import ForwardWatch, on_copies
from torch import nn


class Counting(nn.Module):
    """Two buffers, and `write` to change them in a forward."""

    def __init__(self, write: Callable[[Counting], None]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("constant", torch.ones(3))
        self.register_buffer("later", None)
        self.write = write

    def forward(self) -> None:
        self.write(self)


def replace(module: Counting) -> None:
    module.count = module.count + 1


def write(module: Counting) -> None:
    module.count += 1


def make(module: Counting) -> None:
    module.later = torch.ones(1)


def evaluate(module: Counting) -> None:
    with torch.inference_mode():
        module.count = torch.ones(())


CHANGES = {"written to": write, "replaced": replace, "made": make, "replaced under inference_mode": evaluate}


@pytest.mark.parametrize("change", CHANGES)
def test_buffers_of_a_module_of_which_one_changed(change: str) -> None:
    """All of that module's: native code may have written to the others without a trace."""
    counting, still = Counting(CHANGES[change]), Counting(lambda module: None)
    watch = ForwardWatch(nn.ModuleList([counting, still]))
    counting()
    buffers, weights = watch.changed()
    expected = ["count", "constant", "later"] if change == "made" else ["count", "constant"]
    assert buffers == [(counting, name) for name in expected]
    assert not weights


def test_nothing_changes() -> None:
    """Also in buffers that an evaluation has left there, which count no versions."""
    counting = Counting(lambda module: None)
    evaluate(counting)
    watch = ForwardWatch(counting)
    counting()
    assert watch.changed() == ([], False)


@pytest.mark.parametrize("trained", [True, False])
def test_only_trained_weights_count(trained: bool) -> None:
    counting = Counting(lambda module: module.weight.data.add_(1) and None)
    counting.weight.requires_grad_(trained)
    watch = ForwardWatch(counting)
    with torch.no_grad():
        counting.weight.clamp_(0, 1)
    assert watch.changed() == ([], trained)


def test_copies_are_taken_back_after_an_exception() -> None:
    counting = Counting(write)
    kept = counting.count

    def fails() -> None:
        counting()
        assert float(counting.count) == 1
        raise KeyError

    with pytest.raises(KeyError), on_copies([(counting, "count"), (counting, "later")]):
        fails()
    assert counting.count is kept
    assert float(kept) == 0
    assert counting.later is None
