"""The authors' procedure with steering vectors, written from the description of their code, for what it costs.

The vectors are drawn once and trained with Adam on -l_SFT. The perturbed pass runs in eval mode and its states are
detached: the gradient goes through the clean ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lfu_reg.cli.published import blocks_of, distance, hidden_size, hooked, response_mask
from methods.base import Batch, LossFunction, Method


class AuthorsSteering(Method):
    """One persistent vector per block.

    Args:
        model: its blocks are steered.
        length: of the turn, relative to a hidden state of length one.
        learning_rate: of the vectors' Adam.
        lam: weight of the consistency term.
    """

    def __init__(self, model: nn.Module, length: float = 0.1, learning_rate: float = 1e-3, lam: float = 0.1) -> None:
        super().__init__(model)
        self.length, self.lam = length, lam
        self._blocks = blocks_of(model)
        device = next(model.parameters()).device
        self.vectors = [torch.randn(hidden_size(model), device=device, requires_grad=True) for _ in self._blocks]
        self._adam = torch.optim.Adam(self.vectors, lr=learning_rate)

    def __call__(self, model: nn.Module, batch: Batch, sft_loss_fn: LossFunction) -> Tensor:
        """l_SFT + lam * l_cons."""
        model.eval()
        try:
            with hooked(self._blocks, self._blocks, self.turned) as perturbed:
                ascent = -sft_loss_fn(model, batch)
        finally:
            model.train()
        for vector, gradient in zip(self.vectors, torch.autograd.grad(ascent, self.vectors), strict=True):
            vector.grad = gradient
        self._adam.step()
        with hooked(self._blocks, (), None) as clean:
            sft_loss = sft_loss_fn(model, batch)
        return sft_loss + self.lam * distance(perturbed, clean, response_mask(batch))

    def turned(self, i: int, x: Tensor, y: Tensor) -> Tensor:
        """The output of block `i`, turned towards its vector; its length stays."""
        norm = y.norm(dim=-1, keepdim=True)
        vector = self.vectors[i] / self.vectors[i].norm()
        turned = y / norm + self.length * vector.to(y.dtype)
        return norm * turned / turned.norm(dim=-1, keepdim=True)
