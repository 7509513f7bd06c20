"""What PEFT's wrappers mean for hooks, and token masks. Read by duck typing: nothing of PEFT is imported.

An adapter layer wraps a layer of the model as its `base_layer` and returns what both make together. It counts as that
layer, as a whole: a delta on `base_layer` alone would be scaled with it (DoRA, IA3) or rotated (OFT), and a delta on
the adapter's own matrices is no delta of the map.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from torch import nn

from lfu_reg.model.walk import modules_of


def base_layer(module: nn.Module) -> nn.Module | None:
    """What an adapter layer wraps; None for every other module."""
    return module._modules.get("base_layer")


def innermost(module: nn.Module) -> nn.Module:
    """The module itself, or what is inside of the adapter layers around it."""
    while (inner := base_layer(module)) is not None:
        module = inner
    return module


@dataclass(frozen=True)
class PlainLoRA:
    """The adapter of a PEFT layer that returns base_layer(x) + scaling * up(down(x)) and does nothing else."""

    name: str
    down: nn.Linear  # lora_A, [rank, in]
    up: nn.Linear  # lora_B, [out, rank]
    scaling: float


def plain_lora(module: nn.Module) -> PlainLoRA | None:
    """The adapter of `module` if it acts as `PlainLoRA` says, and is trained; None for anything else."""
    layers: Any = sys.modules.get("peft.tuners.lora.layer")
    forward = getattr(getattr(layers, "Linear", None), "forward", None)
    if forward is None or type(module).forward is not forward or "forward" in vars(module):
        return None
    layer: Any = module
    name = acting_adapter(layer)
    if name is None or _is_variant(layer):
        return None
    dropout, down, up = layer.lora_dropout[name], layer.lora_A[name], layer.lora_B[name]
    if not (type(dropout) is nn.Identity or (type(dropout) is nn.Dropout and dropout.p == 0)):
        return None
    if not (_is_plain(down) and _is_plain(up)) or not layer.scaling[name]:
        return None
    if not (down.weight.requires_grad or up.weight.requires_grad):
        return None
    return PlainLoRA(name, down, up, float(layer.scaling[name]))


def acting_adapter(layer: Any) -> str | None:
    """Name of the one adapter whose products a LoRA layer adds at present; None for none of them, and for several."""
    if layer.disable_adapters or layer.merged:
        return None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    return names[0] if len(names) == 1 else None


def _is_variant(layer: Any) -> bool:
    """DoRA and the other variants read the length of the base layer's weight."""
    tables = getattr(layer, "use_dora", None), getattr(layer, "lora_variant", None)
    return any(isinstance(table, dict) and any(table.values()) for table in tables)


def _is_plain(linear: nn.Module) -> bool:
    parameters, inside = linear._parameters, vars(linear)
    hooks = [
        hook for key in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks") for hook in inside[key].values()
    ]
    hooked = any(not getattr(hook, "is_idle", False) for hook in hooks)  # ours are, beside compiled modules
    plain = type(linear) is nn.Linear and type(parameters["weight"]) is nn.Parameter and parameters["bias"] is None
    return plain and not hooked and "forward" not in inside and inside.get("_compiled_call_impl") is None


def virtual_tokens(model: nn.Module) -> int:
    """How many virtual tokens PEFT may put in front of the batch's own (prompt tuning, P-tuning); 0 without PEFT."""
    # Those of prefix tuning are counted as well, but are keys and values: hidden states are no longer than the batch.
    for module in modules_of(model):
        if vars(module).get("_is_prompt_learning"):
            config: Any = getattr(module, "active_peft_config", None)
            return int(getattr(config, "num_virtual_tokens", 0) or 0)
    return 0
