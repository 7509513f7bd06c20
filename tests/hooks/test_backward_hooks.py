"""The users' own backward hooks on the same modules, second derivatives, and a second backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfu_reg import LfURegularizer
from lfu_reg.step.strength import FIRST_STEPS
from tests.support.compare import assert_same_gradients, gradients_of
from tests.support.harness import auxiliary
from tests.support.models import LLAMA, TINY

AUXILIARIES = ("lora", "steering", "weights", "random")
STRATEGIES = ("released", "retained")


def attach(model: nn.Module, name: str, strategy: str, **options: Any) -> LfURegularizer:
    aux = name if name == "random" else auxiliary(name)
    return LfURegularizer(model, aux, **{"alpha": 0.05, "lam": 0.7, "seed": 3, "strategy": strategy, **options})


@pytest.mark.parametrize("first", ["hooks", "regularizer"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", AUXILIARIES)
def test_full_backward_hooks(name: str, strategy: str, first: str) -> None:
    """They change no gradient, and see the backward of each pass once; the retained one's also that which gives g."""
    model, plain = LLAMA.make(), LLAMA.make()
    seen: list[tuple[str, bool]] = []
    step_is_over = False

    def watch() -> None:
        for layer in LLAMA.layers:
            model.get_submodule(layer).register_full_backward_hook(
                lambda m, gi, go, layer=layer: seen.append((layer, step_is_over))
            )

    if first == "hooks":
        watch()
    reg = attach(model, name, strategy)
    reg.load_state_dict({**reg.state_dict(), "step": 11, "strength": {"seen": FIRST_STEPS}})  # nothing is measured
    if first == "regularizer":
        watch()
    loss = reg(model, LLAMA.batch(), LLAMA.loss)
    step_is_over = True
    loss.backward()
    twin = attach(plain, name, strategy)
    twin.load_state_dict(reg.state_dict() | {"step": 11})
    twin(plain, LLAMA.batch(), LLAMA.loss).backward()
    assert_same_gradients(gradients_of(model), gradients_of(plain))
    for layer in LLAMA.layers:
        within, after = ([late for where, late in seen if where == layer].count(late) for late in (False, True))
        # Pass 2 is left at the last layer, before torch has put the user's hook on its output.
        passes = 1 if layer == LLAMA.layers[-1] else 2
        if strategy == "released":
            assert (within, after) == (passes, 0)
        else:
            assert within <= 1
            assert after == passes


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("name", AUXILIARIES)
def test_create_graph_is_refused_with_the_cure(name: str) -> None:
    model = TINY.make()
    reg = attach(model, name, "released")
    loss = reg(model, TINY.batch(), TINY.loss)
    with pytest.raises(RuntimeError, match=r"create_graph=True.*strategy='retained'"):
        loss.backward(create_graph=True)
    with pytest.raises(RuntimeError, match=r"create_graph=True.*strategy='retained'"):
        torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    assert all(p.grad is None for p in model.parameters())
    loss.backward()  # nothing was lost by asking
    assert any(p.grad is not None for p in model.parameters())


def test_second_derivatives_with_the_cure() -> None:
    """A Hessian-vector product through the retained graph, against the formula with the perturbation held fixed."""
    model, batch, vector = TINY.make(), TINY.batch(), 0.1
    with (
        attach(model, "steering", "retained") as reg,
        pytest.raises(RuntimeError, match=r"create_graph=True.*distance=lambda"),
    ):
        torch.autograd.grad(reg(model, batch, TINY.loss), list(model.parameters()), create_graph=True)
    reg = attach(model, "steering", "retained", distance=lambda clean, perturbed: (perturbed - clean).square().mean())
    loss = reg(model, batch, TINY.loss)
    parameters = [p for name, p in model.named_parameters() if "head" not in name]
    deltas = reg.perturbation
    reg.remove()

    def product(of: Tensor) -> list[Tensor]:
        first = torch.autograd.grad(of, parameters, create_graph=True)
        return list(torch.autograd.grad(sum((g * vector).sum() for g in first), parameters))

    def hidden_states(moved: bool) -> list[Tensor]:
        states: list[Tensor] = []
        mask = (batch["labels"] != -100).unsqueeze(-1)

        def hook(name: str) -> Any:
            def changed(module: nn.Module, args: Any, output: Tensor) -> Tensor:
                output = output + mask * deltas[name] if moved else output
                states.append(output)
                return output

            return changed

        handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in reg.layers]
        value = TINY.loss(model, batch)
        for handle in handles:
            handle.remove()
        return [value, *states]

    clean, moved = hidden_states(False), hidden_states(True)
    counts = batch["labels"] != -100
    distances = [F.mse_loss(b[counts], a[counts].detach()) for a, b in zip(clean[1:], moved[1:], strict=True)]
    want = product(clean[0] + 0.7 * torch.stack(distances).mean())
    for got, expected in zip(product(loss), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", AUXILIARIES)
def test_a_second_backward_is_refused(name: str) -> None:
    model = TINY.make()
    loss = attach(model, name, "released")(model, TINY.batch(), TINY.loss)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"backpropagated twice.*strategy='retained'"):
        loss.backward()
