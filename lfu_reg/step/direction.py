"""The ascent direction that a step with one backward starts from: g as a step of plain SFT brought it.

Every few steps are plain SFT for that. A backward of the whole loss would bring the gradient of l_SFT + lam * l_cons,
whose second part points along the direction that the step had: a direction taken from it holds on to itself, and at
strength 1 it soon points against g (docs/choosing-a-strength.md).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lfu_reg.auxiliaries import Auxiliary
from lfu_reg.auxiliaries.ascent import gradient_norm

# So many steps go along one direction, the plain one that brings it among them.
REFRESHED_EVERY = 4


class Direction:
    """That of the last plain step."""

    def __init__(self) -> None:
        self._last: dict[str, Tensor] = {}

    def is_due(self, turn: int) -> bool:
        """Whether this step is to bring one; `turn` counts the steps with LfU."""
        return not self._last or turn % REFRESHED_EVERY == 0

    def collect(self, auxiliary: Auxiliary) -> None:
        """Take what was brought since the last step; the auxiliary forgets it."""
        found: dict[str, Tensor] = {}

        def take(gradients: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            found.update(gradients)
            return gradients

        auxiliary.replace_gradients(take)
        auxiliary.forget_gradient()
        if not found:
            return
        norm = gradient_norm(list(found.values()))
        if not (torch.isfinite(norm) and norm > 0):  # no backward, or one that overflowed
            return
        self._last = {name: gradient.detach().clone() for name, gradient in found.items()}

    def hand_over(self, auxiliary: Auxiliary) -> None:
        """Let it be g; components that it does not know stay where they are."""

        def known(gradients: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            return {
                name: last if (last := self._last.get(name)) is not None and last.shape == zero.shape else zero
                for name, zero in gradients.items()
            }

        auxiliary.replace_gradients(known)
