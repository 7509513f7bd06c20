"""TRL's SFTTrainer with LfU: `LfUSFTTrainer(model, args, train_dataset=data, lfu={"auxiliary": "steering"})`."""

from __future__ import annotations

from typing import Any

from lfu_reg.distances import make_distance
from lfu_reg.integrations.trainer import LfUTrainerMixin

try:
    from trl.trainer import sft_trainer
except ImportError as error:
    raise ImportError("lfu_reg.integrations.trl needs trl and datasets: pip install 'lfu_reg[trl]'") from error

__all__ = ["LfUSFTTrainer", "LfUTrainerMixin"]

NO_LOGITS = (
    "lfu={{'distance': {0!r}}} compares logits, and this version of TRL computes the SFT loss without any (a fused LM "
    "head). Use a distance of hidden states ('mse', 'cosine', 'contrastive'), or LfUTrainer on tokenised data."
)


class LfUSFTTrainer(LfUTrainerMixin, sft_trainer.SFTTrainer):
    """`trl.SFTTrainer` and the argument `lfu` of `LfUTrainerMixin`; everything else is as TRL has it.

    Raises:
        TypeError, ValueError: as `LfUTrainerMixin`, and for a distance of logits where TRL computes none.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        distance = self._lfu_settings.get("distance", "mse")
        this: Any = self
        has_logits = (
            not hasattr(sft_trainer, "add_fused_lm_head")
            or this.compute_loss_func is not None
            or this.label_smoother is not None
        )
        if not has_logits and make_distance(distance).measures == "logits":
            raise ValueError(NO_LOGITS.format(distance))
