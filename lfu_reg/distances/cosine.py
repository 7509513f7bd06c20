"""One minus the cosine similarity of h and h': blind to lengths, so layers of different scale count alike."""

from __future__ import annotations

import torch
from torch import Tensor

from lfu_reg.distances.base import PerLayerDistance, Reduction


class Cosine(PerLayerDistance):
    """1 - cos(h, h'), mean over tokens; `reduction` makes no difference, as no hidden dimension is left."""

    def layer(self, clean: Tensor, perturbed: Tensor, reduction: Reduction) -> Tensor:
        """1 - cos, mean over tokens."""
        return (1 - torch.cosine_similarity(clean, perturbed, dim=-1)).mean()
