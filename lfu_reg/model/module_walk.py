"""The modules of a model, for the walks that every step takes: torch's generators take four times as long."""

from __future__ import annotations

from torch import nn


def modules_of(model: nn.Module) -> list[nn.Module]:
    """What `list(model.modules())` gives: every module once, each before those inside of it."""
    found: dict[nn.Module, None] = {}
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is None or module in found:
            continue
        found[module] = None
        if children := module._modules:
            waiting += reversed([*children.values()])
    return list(found)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What `model.named_parameters()` gives, but only what requires a gradient."""
    found: dict[str, nn.Parameter] = {}
    modules: set[nn.Module | None] = {None}
    parameters: set[int] = set()  # by identity: tensors hash slowly
    waiting: list[tuple[str, nn.Module | None]] = [("", model)]
    while waiting:
        prefix, module = waiting.pop()
        if module is None or module in modules:
            continue
        modules.add(module)
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad and id(parameter) not in parameters:
                parameters.add(id(parameter))
                found[prefix + name] = parameter
        waiting += reversed([(f"{prefix}{name}.", child) for name, child in module._modules.items()])
    return found
