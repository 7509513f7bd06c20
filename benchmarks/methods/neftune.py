"""NEFTune (Jain et al., 2023, arXiv 2310.05914): uniform noise on the input embeddings during training.

x' = x + noise_alpha / sqrt(L d) * u,   u ~ U(-1, 1)^(B x L x d)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from methods.base import Batch, LossFunction, Method


class NEFTune(Method):
    """SFT on noisy embeddings.

    Args:
        model: with `get_input_embeddings()`.
        noise_alpha: size of the noise; the paper tries 5, 10 and 15.
    """

    def __init__(self, model: nn.Module, noise_alpha: float = 5.0) -> None:
        super().__init__(model)
        self.noise_alpha = noise_alpha

    def __call__(self, model: nn.Module, batch: Batch, sft_loss_fn: LossFunction) -> Tensor:
        """The SFT loss of a forward with noise."""
        handle = model.get_input_embeddings().register_forward_hook(self._add_noise)
        try:
            return sft_loss_fn(model, batch)
        finally:
            handle.remove()

    def _add_noise(self, module: nn.Module, args: tuple[Tensor, ...], embedded: Tensor) -> Tensor:
        length, width = embedded.shape[-2:]
        return embedded + torch.empty_like(embedded).uniform_(-1, 1) * (self.noise_alpha / (length * width) ** 0.5)
