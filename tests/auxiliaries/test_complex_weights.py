"""Complex weights: the ascent goes along the complex gradient, whose norm counts real and imaginary parts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lfu_reg import LfURegularizer
from lfu_reg.auxiliaries.ascent import ascend, gradient_norm

DTYPES = {torch.complex64: 1e-5, torch.complex128: 1e-10}


class Spectral(nn.Module):
    """h plus a complex map of its Fourier transform over time, beside a real one."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(size, size, dtype=torch.complex64))
        self.phase = nn.Parameter(torch.randn(size, dtype=torch.complex64))
        self.linear = nn.Linear(size, size)

    def forward(self, h: Tensor) -> Tensor:
        modes = torch.fft.rfft(h, dim=1) @ self.weight.conj() * self.phase
        return h + torch.tanh(self.linear(h) + torch.fft.irfft(modes, n=h.shape[1], dim=1))


class Operator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Spectral() for _ in range(2))

    def forward(self, h: Tensor) -> Tensor:
        for layer in self.layers:
            h = layer(h)
        return h


def of_precision(dtype: torch.dtype) -> nn.Module:
    model = Operator()
    if dtype is torch.complex128:
        for name, parameter in list(model.named_parameters()):
            owner, _, attribute = name.rpartition(".")
            wide = parameter.detach().to(dtype if parameter.is_complex() else torch.float64)
            setattr(model.get_submodule(owner), attribute, nn.Parameter(wide))
    return model


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_step_with_moved_complex_weights(dtype: torch.dtype) -> None:
    """delta = alpha g / ||g||, l_cons and all gradients, against the same by hand."""
    model, tolerance = of_precision(dtype), DTYPES[dtype]
    real = torch.float64 if dtype is torch.complex128 else torch.float32
    x, y = torch.randn(2, 6, 4, dtype=real), torch.randn(2, 6, 4, dtype=real)

    def loss_fn(m: nn.Module, batch: Tensor) -> Tensor:
        return (m(batch) - y).square().mean()

    reg = LfURegularizer(model, "weights", alpha=0.5, lam=5.0)
    loss = reg(model, x, loss_fn)
    loss.backward()

    twin = of_precision(dtype)
    twin.load_state_dict(model.state_dict())
    parameters = dict(twin.named_parameters())
    g = torch.autograd.grad(loss_fn(twin, x), list(parameters.values()))
    norm = math.sqrt(sum(float(i.abs().square().sum()) for i in g))
    moved = {n: p + 0.5 * i / norm for (n, p), i in zip(parameters.items(), g, strict=True)}
    for name, delta in reg.perturbation.items():
        assert delta.dtype == parameters[name].dtype
        torch.testing.assert_close(delta, (moved[name] - parameters[name]).detach(), rtol=tolerance, atol=tolerance)
    assert {d.dtype for d in reg.perturbation.values()} == {dtype, real}

    clean = [h.detach() for h in states(twin, x, {})]
    perturbed = states(twin, x, moved)
    l_cons = sum((a - b).square().mean() for a, b in zip(perturbed, clean, strict=True)) / 2
    total = loss_fn(twin, x) + 5.0 * l_cons
    torch.testing.assert_close(loss.detach(), total.detach(), rtol=tolerance, atol=0)
    total.backward()
    for (name, parameter), own in zip(parameters.items(), model.parameters(), strict=True):
        torch.testing.assert_close(own.grad, parameter.grad, rtol=10 * tolerance, atol=tolerance, msg=name)


def states(model: nn.Module, x: Tensor, moved: dict[str, Tensor]) -> list[Tensor]:
    found = []
    h = x
    for i, layer in enumerate(model.layers):
        mine = {n.removeprefix(f"layers.{i}."): t for n, t in moved.items() if n.startswith(f"layers.{i}.")}
        h = torch.func.functional_call(layer, mine, (h,))
        found.append(h)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_counts_both_parts(dtype: torch.dtype) -> None:
    """Of several tensors of a kind, mixed with real ones, and conjugated ones."""
    real = torch.float64 if dtype is torch.complex128 else torch.float32
    gradients = [torch.full((2,), 3 + 4j, dtype=dtype), torch.full((1,), 5j, dtype=dtype).conj()]
    gradients += [torch.full((3,), 5.0, dtype=real), torch.tensor(5.0, dtype=torch.float16)]
    norm = gradient_norm(gradients)
    assert not norm.is_complex()
    assert float(norm) == pytest.approx(5 * math.sqrt(7))
    _, step = ascend(gradients, 0.7)
    assert [s.dtype for s in step] == [g.dtype for g in gradients]
    for s, g in zip(step, gradients, strict=True):
        torch.testing.assert_close(s, g.resolve_conj() * (0.7 / (5 * math.sqrt(7))), rtol=1e-3, atol=0)
    assert float(gradient_norm(step)) == pytest.approx(0.7, rel=1e-3)


def test_every_group_has_its_own_length() -> None:
    gradients = [torch.randn(3, dtype=torch.complex64), torch.randn(2), torch.randn(4, dtype=torch.complex64)]
    _, step = ascend(gradients, 0.5, per_group=[0, 1, 0])
    assert float(gradient_norm([step[0], step[2]])) == pytest.approx(0.5)
    assert float(gradient_norm([step[1]])) == pytest.approx(0.5)


@pytest.mark.parametrize("wrong", [complex("nan"), complex(0, float("inf")), 0j])
def test_no_step_without_a_direction(wrong: complex) -> None:
    gradients = [torch.full((2,), wrong, dtype=torch.complex128), torch.full((2,), wrong, dtype=torch.complex128)]
    for step in ascend(gradients, 1.0)[1]:
        assert step.dtype == torch.complex128
        assert torch.equal(step, torch.zeros(2, dtype=torch.complex128))
