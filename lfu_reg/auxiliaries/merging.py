"""W + s B A in the place of a linear map's weight, while pass 2 runs.

Thin products beside the map cost rank * (in + out) per token. Merged they cost rank * in * out once, and in * out of
memory: cheaper where there are many more tokens than hidden units. Half-precision weights are never merged: rounding
eats the delta.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lfu_reg.model import peft as adapters
from lfu_reg.model.autocast import without_autocast


@dataclass(frozen=True)
class PlainWeight:
    """A module whose parameter `weight` is all that its linear map depends on, but for a bias.

    Attributes:
        holder: the module.
        transposed: whether the weight is [in, out].
    """

    holder: nn.Module
    transposed: bool

    def merged(self, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """W + scale * B A."""
        weight = self._weight
        left, right = (a.t(), b.t()) if self.transposed else (b, a)
        with without_autocast(weight.device.type):
            return torch.addmm(weight, left, right, alpha=scale)

    def merging_pays(self, dtype: torch.dtype, positions: int) -> bool:
        """Whether it is exact, and cheaper than thin products.

        Args:
            dtype: of the map's output.
            positions: how many rows the map has to work on.
        """
        weight = self._weight
        exact = weight.dtype == dtype and dtype in (torch.float32, torch.float64)
        # So the merged weights take at most a fifth of the memory of the activations around them.
        return exact and 5 * weight.numel() <= positions * sum(weight.shape)

    @property
    def _weight(self) -> Tensor:
        weight = self.holder._parameters["weight"]
        assert weight is not None
        return weight


def plain_weight(module: nn.Module) -> PlainWeight | None:
    """The weight into which a delta could be merged; None where it is packed, parametrised, sharded or compiled."""
    holder = adapters.innermost(module)
    if holder is not module and not (adapters.base_layer(module) is holder and adapters.adds_to_its_base_layer(module)):
        return None
    # A forward of the instance's own (accelerate's offloading) may bring another weight.
    if getattr(holder, "_compiled_call_impl", None) is not None or "forward" in vars(holder):
        return None
    transposed = type(holder).__name__ == "Conv1D"
    if not (type(holder) is nn.Linear or transposed) or type(holder._parameters.get("weight")) is not nn.Parameter:
        return None
    return PlainWeight(holder, transposed)
