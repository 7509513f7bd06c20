"""Eq. 7: KL(softmax(detach(z)) || softmax(z')), the logit-level alternative of Table 6e."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lfu_reg.distances.base import PerLayerDistance, Reduction


class LogitKL(PerLayerDistance):
    """KL divergence between clean and perturbed predictions, mean over tokens. Pass 2 then runs the head as well."""

    measures: Literal["hidden_states", "logits"] = "logits"

    def layer(self, clean: Tensor, perturbed: Tensor, reduction: Reduction) -> Tensor:
        """KL(clean || perturbed), mean over tokens; `reduction` makes no difference."""
        return torch.nn.functional.kl_div(
            perturbed.log_softmax(-1), clean.log_softmax(-1), reduction="batchmean", log_target=True
        )
