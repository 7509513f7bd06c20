"""The returned loss hands over gradients as a backward of the sum would have, whatever is upstream of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lfu_reg.step.returned_loss import returned_loss


def leaves() -> list[Tensor]:
    return [torch.randn(3, 2).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize("upstream", [1.0, 1 / 3, 1024.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradients_times_what_is_upstream(upstream: float, scale: float, dtype: torch.dtype) -> None:
    a, b, none = (leaf.detach().to(dtype).requires_grad_() for leaf in leaves())
    gradients = torch.randn(3, 2, dtype=dtype), torch.randn(3, 2, dtype=dtype)
    (
        returned_loss(torch.tensor(2.0), [(a, gradients[0]), (b, gradients[1]), (none, None)], scale) * upstream
    ).backward()
    assert none.grad is None
    for leaf, gradient in zip((a, b), gradients, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, (gradient.double() * upstream / scale).to(dtype))


def test_leaves_that_share_a_gradient_each_get_their_own() -> None:
    a, b, _ = leaves()
    shared = list(torch.autograd.grad((a + b).square().sum(), (a, b)))
    pairs = list(zip((a, b), shared, strict=True))
    loss = returned_loss(torch.tensor(1.0), pairs)
    expected = shared[0].clone()
    del pairs, shared
    loss.backward()
    assert a.grad is not None
    assert b.grad is not None
    a.grad.zero_()  # as clipping in place does
    torch.testing.assert_close(b.grad, expected)


def test_gradients_that_somebody_holds_on_to_stay_theirs() -> None:
    a, *_ = leaves()
    held = torch.randn(3, 2)
    before = held.clone()
    returned_loss(torch.tensor(1.0), [(a, held)]).backward()
    assert a.grad is not None
    a.grad.zero_()
    torch.testing.assert_close(held, before)
