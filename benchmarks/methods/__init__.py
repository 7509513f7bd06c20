"""Fine-tuning methods that LfU is compared with, one a file: `loss = method(model, batch, sft_loss_fn)`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from methods.base import SFT, Method
from methods.ema import EMA
from methods.feature_norms import FeatureNorm
from methods.gem import GEM
from methods.instruction_modelling import InstructionModelling
from methods.kl_to_base import KLToBase
from methods.l2_sp import L2SP
from methods.lfu import LfU
from methods.neftune import NEFTune
from methods.r_drop import RDrop
from methods.sam import SAM
from methods.sdft import self_distilled

__all__ = ["METHODS", "SFT", "Method", "self_distilled"]

# Every entry takes the model and its hyperparameters by keyword.
METHODS: dict[str, Callable[..., Method]] = {
    "sft": SFT,
    "neftune": NEFTune,
    "im": InstructionModelling,
    "gem": GEM,
    "sam": SAM,
    "feature-l1": partial(FeatureNorm, norm="l1"),
    "feature-l2": partial(FeatureNorm, norm="l2"),
    "ema": EMA,
    "r-drop": RDrop,
    "kl-to-base": KLToBase,
    "l2-sp": L2SP,
    "lfu": LfU,
    "logit-kl": partial(LfU, distance="logit_kl"),
}
