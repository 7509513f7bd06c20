"""Walks over a model that every step takes: torch's own put a name together for each module, and ask for none here."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def modules_of(model: nn.Module) -> list[nn.Module]:
    """As `list(model.modules())`, in the same order."""
    seen: dict[nn.Module, None] = {}
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is None or module in seen:
            continue
        seen[module] = None
        waiting.extend(reversed(module._modules.values()))
    return list(seen)


def parameters_of(model: nn.Module) -> Iterator[nn.Parameter]:
    """As `model.parameters()`, in the same order."""
    seen: set[int] = set()
    for module in modules_of(model):
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter
