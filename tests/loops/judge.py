"""Trains a model with the README's line and its default settings, and judges steps 0, 1 and 3 by three plain forwards.

alpha and lam are those that the step itself has reported; everything else is the oracle's own.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lfu_reg import LfURegularizer, LfUWarning
from tests.support import oracle
from tests.support.compare import assert_same_gradients, close, gradients_of
from tests.support.harness import a_matrices_of

JUDGED = (0, 1, 3)


def assert_exact(
    make: Callable[[], nn.Module],
    batch_of: Callable[[], Any],
    loss_fn: Callable[[Any, Any], Tensor],
    *,
    mask: Callable[[Any, str], Tensor | None] = lambda batch, layer: None,
    channel_axis: int | Callable[[str], int] = -1,
    layers: Sequence[str] | None = None,
    told: Sequence[str] = (),
    finish: Callable[[Tensor], Tensor] = lambda loss: loss,
    auxiliaries: Sequence[str] = ("lora", "steering"),
    **settings: Any,
) -> None:
    """Every judged step's loss, l_cons and gradients are the literal ones.

    Args:
        make: of the model.
        batch_of: of a step, drawn from torch's generator.
        loss_fn: of the loop.
        mask: the positions of a layer that count, said by hand.
        channel_axis: of hidden states, or of a layer's.
        layers: their names, if the regularizer is to have found these.
        told: beginnings of the warnings that the default auxiliary may give, and has to give.
        finish: what the loop does to the loss before the backward.
        auxiliaries: which ones.
        settings: of the regularizer, beside the defaults.
    """
    for auxiliary in auxiliaries:
        torch.manual_seed(7)
        model = make().double().train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
        with warnings.catch_warnings(record=True) as said, ExitStack() as stack:
            warnings.simplefilter("always", LfUWarning)
            reg = stack.enter_context(LfURegularizer(model, auxiliary, **settings))
            assert layers is None or reg.layers == tuple(layers), reg.layers
            for step in range(JUDGED[-1] + 1):
                batch, before = batch_of(), copy.deepcopy(model)
                torch.manual_seed(step)
                loss = reg(model, copy.copy(batch), loss_fn)
                factor = finish(torch.ones(())).item()
                finish(loss).backward()
                if step in JUDGED:
                    _judge(reg, before, model, batch, loss_fn, mask, channel_axis, factor, step)
                optimizer.step()
                optimizer.zero_grad()
        messages = [str(entry.message) for entry in said if issubclass(entry.category, LfUWarning)]
        if auxiliary == auxiliaries[0]:
            unheard = [start for start in told if not any(message.startswith(start) for message in messages)]
            assert not unheard, messages
        assert not [m for m in messages if not m.startswith(tuple(told))], messages


def _judge(
    reg: LfURegularizer,
    before: nn.Module,
    model: nn.Module,
    batch: Any,
    loss_fn: Any,
    mask: Any,
    channel_axis: Any,
    factor: float,
    step: int,
) -> None:
    kind = "lora" if hasattr(reg.auxiliary, "rank") else "steering"
    alpha, lam = float(reg.metrics["alpha"]), float(reg.metrics["lam"])
    want = oracle.step(
        before,
        {"batch": batch},
        lambda model, wrapped: loss_fn(model, copy.copy(wrapped["batch"])),
        reg.layers,
        oracle.Setup(kind, alpha, lam, channel_axis=channel_axis),
        lambda wrapped, layer: mask(wrapped["batch"], layer),
        a_matrices=a_matrices_of(reg) if kind == "lora" else None,
        seed=step,
    )
    assert float(want.consistency) > 0, "the case compares nothing"
    close(reg.metrics["sft_loss"], want.sft_loss, 1e-9)
    close(reg.metrics["consistency_loss"] / want.consistency, 1.0, 1e-9)
    gradients = {name: None if g is None else g / factor for name, g in gradients_of(model).items()}
    assert_same_gradients(gradients, want.gradients, 1e-7)
