"""Which positions count, as callables of the batch: the hidden state at position t predicts token t + 1."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from methods.base import IGNORED, Batch


def predicting_positions(batch: Batch) -> Tensor:
    """Those that predict a response token: one to the left of the response's own. All tokens where there is none."""
    if "labels" not in batch:
        return batch["attention_mask"]
    counted = torch.zeros_like(batch["labels"])
    counted[:, :-1] = batch["labels"][:, 1:] != IGNORED
    return counted


def all_tokens(batch: Batch) -> Tensor:
    """Prompt and response, without padding."""
    return batch["attention_mask"]


# None: the library's own choice, the response tokens' own positions, as in the authors' code.
MASKS: dict[str, Callable[[Batch], Tensor] | None] = {
    "response": None,
    "shifted": predicting_positions,
    "all": all_tokens,
}
