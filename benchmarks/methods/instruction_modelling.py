"""Instruction modelling (Shi et al., 2024, arXiv 2405.14394): the loss covers the instruction's tokens as well."""

from __future__ import annotations

from torch import Tensor

from methods.base import IGNORED, Batch, LossFunction, Method


class InstructionModelling(Method):
    """SFT with every unpadded token as a label."""

    def __call__(self, model: object, batch: Batch, sft_loss_fn: LossFunction) -> Tensor:
        """The SFT loss of the batch with such labels."""
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
        return sft_loss_fn(model, {**batch, "labels": labels})
