"""Parameters replaced by other tensors for a while, without ever being written to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def substituted(replacements: Iterable[tuple[nn.Module, str, Tensor]]) -> Iterator[None]:
    """Let modules see other tensors in the place of their parameters for the block, also if an exception ends it.

    Args:
        replacements: (module, name of its parameter, tensor to use instead); the tensor may carry a graph.
    """
    listed = list(replacements)
    kept = [(module, name, module._parameters[name]) for module, name, _ in listed]
    try:
        for module, name, tensor in listed:
            module._parameters[name] = tensor  # type: ignore[assignment]
        yield
    finally:
        for module, name, parameter in kept:
            module._parameters[name] = parameter
