"""Parameters replaced by other tensors for a while, without ever being written to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from torch import Tensor, nn

# A module, the name of its parameter, and the tensor to use instead, which may carry a graph.
Replacement: TypeAlias = tuple[nn.Module, str, Tensor]


@contextmanager
def substituted(replacements: Iterable[Replacement]) -> Iterator[None]:
    """Let modules see other tensors in the place of their parameters for the block, also if an exception ends it."""
    listed = list(replacements)
    kept = [(module, name, module._parameters[name]) for module, name, _ in listed]
    try:
        for module, name, tensor in listed:
            module._parameters[name] = tensor  # type: ignore[assignment]
        yield
    finally:
        for module, name, parameter in kept:
            module._parameters[name] = parameter
