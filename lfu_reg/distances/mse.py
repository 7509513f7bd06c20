"""Eq. 5: the squared distance between hidden states.

reduction="mean": per layer the mean over tokens and the hidden dimension, then over layers (the authors' code).
reduction="sum": the hidden dimension is summed, literally 1/(TK) sum_t sum_l ||h - h'||^2.

All layers go through one fused operation, a Triton kernel on GPUs (`lfu_reg.distances.kernels`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import get_args

import torch
from torch import Tensor, nn

from lfu_reg.distances.base import PerLayerDistance, Reduction
from lfu_reg.distances.kernels.entry import Impl, mse_over_layers

# Kernels read memory by its address, which subclasses (distributed tensors, ...) need not have; the compiler's tensors
# have none either, and it fuses the plain operations itself.
_PLAIN = {Tensor, nn.Parameter}
_IMPLS = get_args(Impl)  # here and not in a method: torch 2.6 cannot compile a look at an annotation


class MSE(PerLayerDistance):
    """Mean squared error over layers.

    Args:
        impl: "auto" takes the Triton kernel on CUDA and ROCm once a trial on a tiny problem has succeeded, and plain
            torch operations elsewhere and for float64; "torch" always takes these, and "triton" the kernel, without a
            trial. Both give the same values up to rounding.

    Raises:
        ValueError: for another `impl`.
    """

    def __init__(self, impl: Impl = "auto") -> None:
        if impl not in _IMPLS:
            raise ValueError(f"impl={impl!r}; allowed are {', '.join(map(repr, _IMPLS))}.")
        self.impl: Impl = impl

    def __call__(
        self,
        clean: Sequence[Tensor],
        perturbed: Sequence[Tensor],
        token_index: Sequence[Tensor | None],
        reduction: Reduction,
    ) -> tuple[Tensor, Tensor]:
        """Mean over layers; see `Distance`."""
        if torch.compiler.is_compiling() or not set(map(type, chain(clean, perturbed))) <= _PLAIN:
            return super().__call__(clean, perturbed, token_index, reduction)
        return mse_over_layers(clean, perturbed, token_index, reduction=reduction, impl=self.impl)

    def layer(self, clean: Tensor, perturbed: Tensor, reduction: Reduction) -> Tensor:
        """The squared distance per token, or per token and hidden unit."""
        difference = perturbed - clean
        total = difference.square().sum()
        return total / (clean.numel() if reduction == "mean" else len(clean))

    def __repr__(self) -> str:
        return "MSE()" if self.impl == "auto" else f"MSE(impl={self.impl!r})"
