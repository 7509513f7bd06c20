"""Methods that read logits work whatever the loss function calls, and say so where there are none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from methods import METHODS
from methods.predictions import predictions
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint

from tests.benchmarks.test_methods import Batch, batch, gradients, make, same


def trunk_and_head(model: Any, data: Batch) -> tuple[Tensor, Any]:
    whole = model.get_base_model()
    inputs = {name: data[name] for name in ("input_ids", "attention_mask")}
    return whole.model(**inputs).last_hidden_state, whole.lm_head


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=-100)


def of_the_model(model: Any, data: Batch) -> Tensor:
    inputs = {name: data[name] for name in ("input_ids", "attention_mask")}
    return loss_of(model(**inputs).logits[:, :-1], data["labels"][:, 1:])


def of_all_tokens(model: Any, data: Batch) -> Tensor:
    hidden, head = trunk_and_head(model, data)
    return loss_of(head(hidden)[:, :-1], data["labels"][:, 1:])


def of_all_but_the_last(model: Any, data: Batch) -> Tensor:
    hidden, head = trunk_and_head(model, data)
    return loss_of(head(hidden[:, :-1]), data["labels"][:, 1:])


def flattened(model: Any, data: Batch) -> Tensor:
    hidden, head = trunk_and_head(model, data)
    return loss_of(head(hidden[:, :-1].flatten(0, 1)), data["labels"][:, 1:])


def of_response_tokens(model: Any, data: Batch) -> Tensor:
    hidden, head = trunk_and_head(model, data)
    counted = data["labels"][:, 1:] != -100
    return loss_of(head(hidden[:, :-1][counted]), data["labels"][:, 1:][counted])


def in_chunks(model: Any, data: Batch) -> Tensor:
    hidden, head = trunk_and_head(model, data)
    counted = data["labels"][:, 1:] != -100
    logits = [head(chunk) for chunk in hidden[:, :-1][counted].split(3)]
    return loss_of(torch.cat(logits), data["labels"][:, 1:][counted])


def along_the_sequence(model: Any, data: Batch) -> Tensor:
    hidden, head = trunk_and_head(model, data)
    logits = torch.cat([head(chunk) for chunk in hidden[:, :-1].split(2, dim=1)], dim=1)
    return loss_of(logits, data["labels"][:, 1:])


@pytest.mark.parametrize(
    "loss", [of_all_tokens, of_all_but_the_last, flattened, of_response_tokens, in_chunks, along_the_sequence]
)
@pytest.mark.parametrize("name", ["gem", "kl-to-base", "r-drop", "dft", "asft", "eaft", "talr", "flow", "stm"])
def test_trunk_and_head_called_one_by_one(name: str, loss: Callable[[Any, Batch], Tensor]) -> None:
    found = []
    model, data = make(dropout=0.3 if name == "r-drop" else 0.0), batch()
    for function in (of_the_model, loss):
        method = METHODS[name](model, **({"threshold": 30.0} if name == "stm" else {}))
        torch.manual_seed(6)
        method.prepare([data], function)
        value = method(model, data, function)
        found.append((float(value.detach()), gradients(value, model)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    same(found[0][1], found[1][1])


def test_a_fused_loss_shows_no_logits() -> None:
    def fused(model: Any, data: Batch) -> Tensor:
        hidden, head = trunk_and_head(model, data)
        return loss_of(linear(hidden, head.weight)[:, :-1], data["labels"][:, 1:])

    model = make()
    for name in ("gem", "kl-to-base", "r-drop", "dft"):
        options = {"needs_dropout": False} if name == "r-drop" else {}
        with pytest.raises(ValueError, match="nor its head"):
            METHODS[name](model, **options)(model, batch(), fused)
    assert not any(m._forward_hooks for m in model.modules())


def test_a_head_called_on_something_else() -> None:
    def of_last_tokens(model: Any, data: Batch) -> Tensor:
        hidden, head = trunk_and_head(model, data)
        return head(hidden[:, -1]).square().mean()

    with pytest.raises(ValueError, match="fit neither the 3 x 7 tokens"):
        predictions(make(), batch(), of_last_tokens)


def test_logits_without_a_gradient_are_refused() -> None:
    def reentrant(model: Any, data: Batch) -> Tensor:
        hidden, head = trunk_and_head(model, data)
        return checkpoint(lambda h: loss_of(head(h)[:, :-1], data["labels"][:, 1:]), hidden, use_reentrant=True)

    with pytest.raises(ValueError, match="have no gradient"):
        predictions(make(), batch(), reentrant)
