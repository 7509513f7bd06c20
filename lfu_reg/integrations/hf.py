"""transformers' Trainer with LfU: `LfUTrainer(model, args, train_dataset=data, lfu={"auxiliary": "steering"})`."""

from __future__ import annotations

from lfu_reg.integrations.trainer import LfUTrainerMixin

try:
    from transformers import Trainer
except ImportError as error:
    raise ImportError("lfu_reg.integrations.hf needs transformers and accelerate: pip install 'lfu_reg[hf]'") from error

__all__ = ["LfUTrainer", "LfUTrainerMixin"]


class LfUTrainer(LfUTrainerMixin, Trainer):
    """`transformers.Trainer` and the argument `lfu` of `LfUTrainerMixin`; everything else is as transformers has it."""
