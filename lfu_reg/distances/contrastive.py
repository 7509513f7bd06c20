"""InfoNCE over tokens (van den Oord et al., 2018): h'_t must resemble h_t more than other tokens' clean states."""

from __future__ import annotations

import torch
from torch import Tensor

from lfu_reg.distances.base import PerLayerDistance, Reduction


class Contrastive(PerLayerDistance):
    """Cross-entropy of picking the own clean state among those of all tokens, by cosine similarity.

    It costs tokens^2 * hidden per layer, and unlike the others it is not zero where nothing was perturbed.

    Args:
        temperature: divides the similarities.
        max_tokens: of more tokens than this, evenly spaced ones are compared.
    """

    def __init__(self, temperature: float = 0.1, max_tokens: int = 512) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature={temperature!r}; allowed are positive numbers.")
        if max_tokens < 2:
            raise ValueError(f"max_tokens={max_tokens!r}; allowed are whole numbers from 2.")
        self.temperature = temperature
        self.max_tokens = max_tokens

    def layer(self, clean: Tensor, perturbed: Tensor, reduction: Reduction) -> Tensor:
        """InfoNCE, mean over tokens; `reduction` makes no difference."""
        stride = -(-len(clean) // self.max_tokens)
        h = torch.nn.functional.normalize(clean[::stride], dim=-1)
        h_prime = torch.nn.functional.normalize(perturbed[::stride], dim=-1)
        similarity = h_prime @ h.t() / self.temperature  # [tokens, tokens]
        return torch.nn.functional.cross_entropy(similarity, torch.arange(len(h), device=h.device))

    def __repr__(self) -> str:
        return f"Contrastive(temperature={self.temperature}, max_tokens={self.max_tokens})"
