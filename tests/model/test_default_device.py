"""torch.set_default_device and set_default_dtype say nothing about the library's own tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lfu_reg import LoRADeltas, SteeringVectors, WeightDeltas
from lfu_reg.auxiliaries.ascent import ascend
from lfu_reg.auxiliaries.base import Call, Tokens
from lfu_reg.model.rng import StepDraws
from lfu_reg.model.tokens import TokenMasks, ignored_but_counted

DEFAULTS: dict[str, Any] = {"meta": "meta", "float64": torch.float64, "bfloat16": torch.bfloat16}


@contextmanager
def default(kind: str) -> Iterator[None]:
    if kind == "meta":
        with torch.device("meta"):
            yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(DEFAULTS[kind])
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def samples() -> list[Tensor]:
    found = StepDraws(1, 2).samples(8, 0.5)
    return [] if found is None else [found]


def components(auxiliary: Any) -> list[Tensor]:
    call = Call("l", LINEAR, X, X, Tokens())
    started = list(auxiliary.start(call, StepDraws(1, 2).generator(X.device)))
    rule = auxiliary.gradient_rule(tuple(started), call)
    return [*started, *(g for g in rule(X) if g is not None), auxiliary.apply(tuple(started), call)]


def masks() -> list[Tensor]:
    batch = {"labels": torch.tensor([[1, -1]], device="cpu"), "attention_mask": ADDITIVE}
    return [part for part in TokenMasks(batch).match(HIDDEN, -1, encoder=False) if part is not None]


def deltas() -> list[Tensor]:
    auxiliary = WeightDeltas()
    auxiliary.sites(LINEAR, {})
    auxiliary.reset(StepDraws(1, 2).generator)
    found = [auxiliary.ascend(1.0)]
    auxiliary.gradient_from(list(LINEAR.parameters()), [torch.ones_like(p) for p in LINEAR.parameters()])
    found.append(auxiliary.ascend(1.0))
    return [*found, *auxiliary.perturbation().values()]


LINEAR, X, HIDDEN, ADDITIVE = nn.Linear(3, 3), torch.ones(4, 3), torch.zeros(1, 2, 3), torch.tensor([[0.0, -9.0]])
GRADIENTS = [torch.ones(3), torch.ones(2, dtype=torch.complex64), torch.ones(2).half()]

MADE: dict[str, Callable[[], list[Tensor]]] = {
    "samples of a batch": samples,
    "steering vectors": lambda: components(SteeringVectors()),
    "relative steering vectors": lambda: components(SteeringVectors(relative=True)),
    "LoRA deltas": lambda: components(LoRADeltas(rank=2)),
    "moved weights": deltas,
    "ascent": lambda: [*ascend(GRADIENTS, 1.0)[1], *ascend(GRADIENTS, 1.0, per_group=[0, 1, 0])[1]],
    "token masks": masks,
}


@pytest.mark.parametrize("kind", DEFAULTS)
@pytest.mark.parametrize("name", MADE)
def test_what_the_library_makes(name: str, kind: str) -> None:
    want = MADE[name]()
    with default(kind):
        got = MADE[name]()
    assert len(got) == len(want) > 0
    for one, other in zip(got, want, strict=True):
        assert (one.device, one.dtype) == (other.device, other.dtype)
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", DEFAULTS)
def test_counted_positions(kind: str) -> None:
    has_gradient = torch.tensor([True, False, False])
    with default(kind):
        assert ignored_but_counted(has_gradient) == (1, 3)
