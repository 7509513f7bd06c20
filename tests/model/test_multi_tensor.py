"""One call for many tensors: which go together, and what zero means."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lfu_reg.model import multi_tensor as foreach


class Own(Tensor):
    """A tensor of a class of its own."""


def test_every_tensor_comes_once_and_none_is_left_out() -> None:
    tensors: list[Tensor | None] = [
        torch.ones(2),
        None,
        torch.ones(3, dtype=torch.float64),
        nn.Parameter(torch.ones(1)),
    ]
    assert sorted(foreach.portions(tensors)) == [[0, 3], [2]]


def test_what_is_no_plain_tensor_comes_alone() -> None:
    tensors = [torch.ones(2), torch.ones(2).to_sparse(), torch.ones(2).as_subclass(Own), torch.ones(2)]
    assert sorted(foreach.portions(tensors)) == [[0, 3], [1], [2]]


def test_portions_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreach, "PORTION", 10)
    tensors = [torch.ones(n) for n in (4, 6, 1, 25, 1, 2)]
    assert list(foreach.portions(tensors)) == [[0, 1], [2], [3], [4, 5]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("number", [1, 3])
def test_zero_unless(dtype: torch.dtype, number: int) -> None:
    values = torch.tensor([[1.5, float("inf"), float("-inf")], [float("nan"), -0.0, 3e-42]], dtype=dtype).t()
    given = [values.clone() for _ in range(number)]
    for kept in foreach.zero_unless(torch.tensor(True), [g.clone() for g in given]):
        assert torch.equal(kept.nan_to_num(7.0), values.nan_to_num(7.0))
    for zeroed in foreach.zero_unless(torch.tensor(False), [g.clone() for g in given]):
        assert torch.equal(zeroed, torch.zeros_like(values))


@pytest.mark.parametrize("number", [1, 3])
def test_multiplied(number: int) -> None:
    tensors = [torch.randn(2, 3, dtype=torch.float64) for _ in range(number)]
    for product, tensor in zip(
        foreach.multiplied(tensors, torch.tensor(0.3, dtype=torch.float64)), tensors, strict=True
    ):
        torch.testing.assert_close(product, tensor * 0.3, rtol=1e-15, atol=0)
