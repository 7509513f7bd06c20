"""A control: the ascent step of LfU, taken downhill."""

from __future__ import annotations

from torch import Tensor

from lfu_reg import RandomDirections


class OppositeDirection(RandomDirections):
    """The components of another auxiliary, moved by -alpha * g / ||g||.

    To first order in alpha h' - h changes its sign with the direction, and with it the gradient of l_cons. So this
    isolates whether it matters that the other self is undesirable: consistency as such, the size of the step and the
    space it is taken in are the same.
    """

    def direction(self, gradients: list[Tensor]) -> list[Tensor]:
        """Minus the gradient."""
        return [-gradient for gradient in gradients]
