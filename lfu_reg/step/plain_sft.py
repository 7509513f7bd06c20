"""The way out of a step that cannot be regularized, or is not to be."""

from __future__ import annotations

from torch import Tensor


class PlainSFT(Exception):
    """This step is plain SFT, whose loss this is, with its gradients."""

    def __init__(self, loss: Tensor) -> None:
        super().__init__()
        self.loss = loss
