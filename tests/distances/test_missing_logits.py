"""distance="logit_kl" on models that return no logits: an error with the cure, not the distance of something else."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast

from lfu_reg import LfURegularizer
from tests.support.models import TINY
from tests.support.plain_models import TinyLM
from tests.support.refusals import says

RETURNED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "ModelOutput": lambda loss, logits: CausalLMOutputWithPast(loss=loss, logits=None),
    "with hidden states": lambda loss, logits: CausalLMOutputWithPast(loss=loss, hidden_states=(logits, logits)),
    "dict": lambda loss, logits: {"loss": loss, "logits": None, "hidden_states": logits},
    "dict without the entry": lambda loss, logits: {"loss": loss, "hidden_states": logits},
    "base model": lambda loss, logits: BaseModelOutput(last_hidden_state=logits),
    "tuple": lambda loss, logits: (loss, None),
    "the loss": lambda loss, logits: loss,
    "object": lambda loss, logits: SimpleNamespace(loss=loss, logits=None),
}


class Fused(TinyLM):
    """Returns its loss, and no logits."""

    pack: Callable[[Tensor, Tensor], Any]

    def forward(self, input_ids: Tensor) -> Any:
        logits = super().forward(input_ids)
        self.loss = logits.square().mean()
        return self.pack(self.loss, logits)


@pytest.mark.parametrize("kind", RETURNED)
def test_a_model_without_logits(kind: str) -> None:
    model = Fused().double()
    model.pack = RETURNED[kind]

    def loss_fn(m: Any, batch: Any) -> Tensor:
        m(batch["input_ids"])
        return m.loss

    parts = ("holds no logits", "logit_kl", "distance='mse'", "use_liger_kernel=False")
    with LfURegularizer(model, "steering", distance="logit_kl") as reg, pytest.raises(ValueError, match=says(*parts)):
        reg(model, TINY.batch(), loss_fn)
    assert all(p.grad is None for p in model.parameters())


PACKED: dict[str, Callable[[Tensor], Any]] = {
    "ModelOutput": lambda logits: CausalLMOutputWithPast(
        loss=logits.mean(), logits=logits, hidden_states=(logits * 2,)
    ),
    "dict": lambda logits: {"extra": logits * 2, "logits": logits},
    "tuple": lambda logits: (logits.mean(), logits),
    "tensor": lambda logits: logits,
    "another name": lambda logits: {"scores": logits},
}


@pytest.mark.parametrize("kind", PACKED)
def test_logits_are_found_in_what_a_model_returns(kind: str) -> None:
    class Packing(TinyLM):
        def forward(self, input_ids: Tensor) -> Any:
            self.logits = super().forward(input_ids)
            return PACKED[kind](self.logits)

    def loss_fn(m: Any, batch: Any) -> Tensor:
        m(batch["input_ids"])
        return nn.functional.cross_entropy(m.logits.flatten(0, 1), batch["input_ids"].flatten())

    found = []
    for make in (TinyLM, Packing):
        torch.manual_seed(1)
        model = make().double()
        loss = loss_fn if make is Packing else plain
        with LfURegularizer(model, "steering", distance="logit_kl") as reg:
            found.append((reg(model, TINY.batch(), loss).detach(), reg.metrics["consistency_loss"]))
    assert float(found[0][1]) > 0
    torch.testing.assert_close(found[0], found[1])


def plain(model: Any, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["input_ids"].flatten())
