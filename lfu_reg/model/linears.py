"""Linear maps, whatever class they are: nn.Linear, transformers' Conv1D, PEFT-wrapped and quantised ones.

Only the sizes are read, never the weight: a packed 4-bit weight has neither the right shape nor a dtype to compute in.

PEFT's adapter layers are read by duck typing. One wraps a layer of the model as its `base_layer` and returns what both
make together. It counts as that layer, as a whole: a delta on `base_layer` alone would be scaled with it (DoRA, IA3) or
rotated (OFT), and a delta on the adapter's own matrices is no delta of the map.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from torch import Tensor, nn

TargetModules: TypeAlias = str | Sequence[str]

# What libraries call the sizes of a linear map; the second pair is that of the first GPTQ kernels.
_SIZES = (("in_features", "out_features"), ("infeatures", "outfeatures"))


def base_layer(module: nn.Module) -> nn.Module | None:
    """What an adapter layer of PEFT wraps; None for every other module."""
    return module._modules.get("base_layer")


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a linear map y = W x + b over the last dimension; None for every other module."""
    # PEFT's own `in_features` also stand for embeddings, convolutions and single parameters.
    while (inner := base_layer(module)) is not None:
        module = inner
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # transformers' transposed Linear
        assert isinstance(module.weight, Tensor)  # its sizes: nx is missing before 4.46
        return module.weight.shape[0], module.weight.shape[1]
    if getattr(module, "n_groups", 1) != 1:  # block-diagonal (DeepSeek-V4): its sizes are those of no single map
        return None
    for names in _SIZES:
        n_in, n_out = (getattr(module, name, None) for name in names)
        if isinstance(n_in, int) and isinstance(n_out, int):
            return n_in, n_out
    return None


def find_linears(layers: Mapping[str, nn.Module], target_modules: TargetModules = "all-linear") -> dict[str, nn.Module]:
    """Linear maps in the given layers by full name; a wrapper around one (PEFT's `lora.Linear`) counts as that one."""
    found: dict[str, nn.Module] = {}
    for name, layer in layers.items():
        _collect(layer, name, found)
    chosen = {name: module for name, module in found.items() if _is_target(name, target_modules)}
    if found and not chosen:
        kinds = sorted({name.rsplit(".", 1)[-1] for name in found})
        raise ValueError(
            f"target_modules={target_modules!r} matches no linear map in the chosen layers. There are {len(found)}, "
            f"whose names end in: {', '.join(kinds)} (for example {next(iter(found))!r}). Give 'all-linear', a list of "
            "such endings, or a regular expression that matches whole names."
        )
    return chosen


def _collect(module: nn.Module, name: str, found: dict[str, nn.Module]) -> None:
    if linear_sizes(module) is not None and module not in found.values():
        found[name] = module
        return
    if (inner := base_layer(module)) is not None:  # what else is in an adapter layer is the adapter's
        _collect(inner, f"{name}.base_layer", found)
        return
    for child_name, child in module.named_children():
        _collect(child, f"{name}.{child_name}", found)


def _is_target(name: str, target_modules: TargetModules) -> bool:
    if isinstance(target_modules, str):
        return target_modules == "all-linear" or re.fullmatch(target_modules, name) is not None
    if isinstance(target_modules, Iterable) and all(isinstance(target, str) for target in target_modules):
        return any(name == target or name.endswith(f".{target}") for target in target_modules)
    raise TypeError(
        f"target_modules={target_modules!r}; allowed are 'all-linear', a regular expression, or a list of module names."
    )
