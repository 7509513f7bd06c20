"""Fine-tuning methods that LfU is compared with, one a file: `loss = method(model, batch, sft_loss_fn)`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from methods.asft import ASFT
from methods.base import SFT, Method
from methods.dft import DFT
from methods.eaft import EAFT
from methods.ema import EMA
from methods.feature_norms import FeatureNorm
from methods.flow import FLOW
from methods.gem import GEM
from methods.grids import GRIDS
from methods.instruction_modelling import InstructionModelling
from methods.kl_to_base import KLToBase
from methods.l2_sp import L2SP
from methods.lfu import LfU
from methods.neftune import NEFTune
from methods.r_drop import RDrop
from methods.sam import SAM
from methods.sdft import self_distilled
from methods.steering_only import SteeringOnly
from methods.stm import STM
from methods.talr import TALR
from methods.wise_ft import WiSEFT

__all__ = ["GRIDS", "METHODS", "SFT", "Method", "self_distilled"]

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
    "wise-ft": WiSEFT,
    "dft": DFT,
    "asft": ASFT,
    "eaft": EAFT,
    "talr": TALR,
    "stm": STM,
    "flow": FLOW,
    "lfu": LfU,
    "logit-kl": partial(LfU, distance="logit_kl"),
    # Controls for what LfU does, by steering vectors. At a strength rho a step of LfU is SFT with an extra gradient,
    # g_SFT + rho ||g_SFT|| g_cons / ||g_cons||: these take g_cons of the ascent direction, its opposite and a random
    # one, all at the same length. What the first and the last share is the effect of any extra gradient of hidden
    # states; what tells them apart is what the ascent is good for. For the opposite see `OppositeDirection`.
    "extra-gradient": partial(LfU, flavour="steering"),
    "lfu-negative": partial(LfU, flavour="negative-steering"),
    "extra-random-gradient": partial(LfU, flavour="random-steering"),
    "steering-only": SteeringOnly,
}
