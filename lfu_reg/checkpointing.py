"""Activation checkpoints and graphs that outlive the step do not go together.

A checkpointed block runs its forward again during the backward pass. The released strategy takes its gradients while
the pass is still set up, so the block repeats exactly what it did. A retained graph is backpropagated by the caller,
when the perturbation is gone: the block would repeat something else, for "weights" without any error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.utils.checkpoint

# What every non-reentrant checkpoint goes through, whoever calls it. Private: where it is gone, nothing is refused.
_ENTRANCE = "_checkpoint_without_reentrant_generator"


@contextmanager
def refused() -> Iterator[None]:
    """Raise RuntimeError if a non-reentrant checkpoint is entered in the block."""
    entrance = getattr(torch.utils.checkpoint, _ENTRANCE, None)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            "Activation checkpointing does not go with a graph that is retained until the caller's backward, where "
            "checkpointed blocks would run again without the perturbation. Use strategy='released' with "
            "stop_gradient='clean' (the defaults), or switch checkpointing off."
        )

    if entrance is None:
        yield
        return
    setattr(torch.utils.checkpoint, _ENTRANCE, refuse)
    try:
        yield
    finally:
        setattr(torch.utils.checkpoint, _ENTRANCE, entrance)
