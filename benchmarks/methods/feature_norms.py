"""Penalties on the hidden states themselves (Table 6c, d): their L1 or squared L2 norm.

l = l_SFT + lam / (T K) sum_t sum_l ||h_{l,t}||,   averaged over the hidden dimension as l_cons is.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from methods.base import Batch, LossFunction, Method, blocks_of, hidden_state, on_tokens


class FeatureNorm(Method):
    """Small features.

    Args:
        model: with blocks.
        norm: "l1" or "l2".
        lam: weight of the penalty.
    """

    def __init__(self, model: nn.Module, norm: Literal["l1", "l2"] = "l2", lam: float = 0.01) -> None:
        super().__init__(model)
        if norm not in ("l1", "l2"):
            raise ValueError(f"norm={norm!r}; allowed are 'l1' and 'l2'.")
        self.norm, self.lam = norm, lam
        self._states: list[Tensor] = []
        self._handles = [block.register_forward_hook(self._keep) for block in blocks_of(model)]

    def __call__(self, model: nn.Module, batch: Batch, sft_loss_fn: LossFunction) -> Tensor:
        """l_SFT plus the penalty."""
        self._states = []
        loss = sft_loss_fn(model, batch)
        sizes = [on_tokens(h, batch["labels"]) for h in self._states]
        self._states = []
        penalties = [(h.abs() if self.norm == "l1" else h.square()).mean() for h in sizes]
        return loss + self.lam * torch.stack(penalties).mean()

    def finish(self) -> None:
        """Hooks off."""
        for handle in self._handles:
            handle.remove()

    def _keep(self, module: nn.Module, args: tuple[Tensor, ...], output: object) -> None:
        self._states.append(hidden_state(output))
