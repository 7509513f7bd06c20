"""Staying near the base model's predictions: l_SFT + weight * KL(p_base || p) on the response tokens."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from methods.base import Batch, LossFunction, Method, kl, outputs_of, predicting


class KLToBase(Method):
    """Distillation from the starting point.

    Args:
        model: a PEFT model, whose base is reached by switching the adapter off, or any other, which is copied.
        weight: of the divergence.
    """

    def __init__(self, model: nn.Module, weight: float = 0.1) -> None:
        super().__init__(model)
        self.weight = weight
        self._copy = None if hasattr(model, "disable_adapter") else copy.deepcopy(model).requires_grad_(False)

    def __call__(self, model: nn.Module, batch: Batch, sft_loss_fn: LossFunction) -> Tensor:
        """l_SFT plus the divergence."""
        adapter_off: AbstractContextManager[object] = model.disable_adapter() if self._copy is None else nullcontext()
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with torch.no_grad(), adapter_off:
            base_logits = (self._copy or model)(**inputs).logits
        with outputs_of(model) as outputs:
            loss = sft_loss_fn(model, batch)
        base, own = (
            predicting(logits, batch["labels"])[0].log_softmax(-1) for logits in (base_logits, outputs[-1].logits)
        )
        return loss + self.weight * kl(base, own)
