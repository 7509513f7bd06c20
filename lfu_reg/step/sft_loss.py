"""The SFT loss of one step, as each of its passes takes it: of a batch of its own, from the same random state."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lfu_reg.model.peft import virtual_tokens
from lfu_reg.model.rng import RandomState
from lfu_reg.model.tokens import TokenMask, TokenMasks
from lfu_reg.step import checks
from lfu_reg.step.trunk import select_samples

LossFunction: TypeAlias = Callable[[Any, Any], Tensor]


def check_loss_function(function: object) -> None:
    """Raise unless it can be called, which a loss cannot."""
    if not callable(function):
        raise TypeError(
            f"sft_loss_fn is a {type(function).__name__}; it has to be a function of (model, batch) that returns the "
            "loss, since LfU runs the model itself: reg(model, batch, sft_loss_fn), not reg(model, batch, loss)."
        )


class SFTLoss:
    """The user's loss function, with what it is called with.

    Args:
        function: of (model, batch).
        model: what the user trains, the attached module or a wrapper of it.
        batch: of pass 1.
        token_mask: see `LfURegularizer`.

    Attributes:
        model: the same.
        tokens: the batch's token masks.
        batch: a shallow copy, for later passes: the function may take entries out of the batch.
    """

    def __init__(self, function: LossFunction, model: Any, batch: Any, token_mask: TokenMask | None) -> None:
        self.model = model
        self._function, self._given, self._token_mask = function, batch, token_mask
        self.tokens = self.tokens_of(batch)
        self.batch = copy.copy(batch)

    def tokens_of(self, batch: Any) -> TokenMasks:
        """Which tokens of a batch count."""
        return TokenMasks(batch, self._token_mask, partial(virtual_tokens, self.model))

    def clean(self, devices: Iterable[torch.device], *, first: bool) -> Tensor:
        """The loss of pass 1. Later passes start from the random state of `devices` that this one finds.

        Args:
            devices: those in use.
            first: whether this is the first step, at which values are checked as well.
        """
        self._random_start, self._first = RandomState.capture(devices), first
        return checks.check_loss(self._function(self.model, self._given), first=first)

    def again(self, batch: Any) -> Tensor:
        """The loss of this batch, with the random draws of pass 1."""
        self._random_start.restore()
        return checks.check_loss(self._function(self.model, batch), first=self._first)

    def repeat(self, samples: Tensor | None, batch_size: int) -> None:
        """Run pass 1's forward again, for some samples of the batch or for all."""
        batch = copy.copy(self.batch) if samples is None else select_samples(self.batch, samples, batch_size)
        self._random_start.restore()
        self._function(self.model, batch)
