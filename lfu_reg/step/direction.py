"""The ascent direction of a step with one backward: g, as the caller's backward of a step before brought it.

It has to be that of l_SFT alone. A backward of l_SFT + lam * l_cons brings the second term's gradient as well, which
points where the last direction pointed: a direction that is taken from it feeds on itself, while the SFT gradient
turns. So steps take turns: a plain one brings a direction, and the next one uses it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lfu_reg.auxiliaries import Auxiliary
from lfu_reg.auxiliaries.ascent import gradient_norm

# Weight of the past in the mean of directions of length one: with more, it lags behind; with less, it is one batch's.
MEMORY = 0.5


class Direction:
    """A mean over the last steps."""

    def __init__(self) -> None:
        self._mean: dict[str, Tensor] = {}
        self.is_new = False  # whether a backward has brought one that no step has used yet

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
        for name, gradient in found.items():
            unit, mean = gradient.detach() / norm, self._mean.get(name)
            known = mean is not None and mean.shape == unit.shape and mean.device == unit.device
            self._mean[name] = MEMORY * mean + (1 - MEMORY) * unit if known and mean is not None else unit
        self.is_new = True

    def hand_over(self, auxiliary: Auxiliary) -> None:
        """Let it be g, once; components that it does not know stay where they are."""
        self.is_new = False

        def known(gradients: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            return {
                name: mean if (mean := self._mean.get(name)) is not None and mean.shape == zero.shape else zero
                for name, zero in gradients.items()
            }

        auxiliary.replace_gradients(known)
