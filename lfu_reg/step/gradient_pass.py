"""A pass that gives nothing but g: for an ascent along other data, or for a further step from a moved theta_aux.

The first step along the batch's own gradient needs none: the taps of pass 1 collect it on the way.
"""

from __future__ import annotations

import copy
from typing import Any

from lfu_reg.auxiliaries import Auxiliary
from lfu_reg.hooks.forward_pass import Pass
from lfu_reg.hooks.model_hooks import ModelHooks
from lfu_reg.step import checks
from lfu_reg.step.gradients import Strategy
from lfu_reg.step.sft_loss import SFTLoss


def gradient_pass(sft: SFTLoss, batch: Any, auxiliary: Auxiliary, hooks: ModelHooks, strategy: Strategy) -> float:
    """Let `auxiliary` collect g = d l_SFT / d theta_aux where it is now.

    Args:
        sft: the loss function of the step.
        batch: of which the loss is taken; it is not changed.
        auxiliary: theta_aux.
        hooks: of the regularizer.
        strategy: takes the gradient.

    Returns:
        What g is multiplied by (see `loss_scale.py`).

    Raises:
        ValueError: if the batch holds a KV cache.
    """
    batch = copy.copy(batch)
    checks.check_batch(batch)
    auxiliary.require_gradients(True)
    moved = list(auxiliary.pass2_patches())
    this = Pass(sft.tokens_of(batch), capture=None, apply=True, replaced=moved)
    with auxiliary.shards_moved(), hooks.run(this):
        loss = sft.again(batch)
        this.recording = False
        strategy.backward_explicit(loss, this, auxiliary)
    auxiliary.require_gradients(False)
    return this.scale
