"""What PEFT's wrappers mean for hooks, and token masks. Read by duck typing: nothing of PEFT is imported.

An adapter layer wraps a layer of the model as its `base_layer` and returns what both make together. It counts as that
layer, as a whole: a delta on `base_layer` alone would be scaled with it (DoRA, IA3) or rotated (OFT), and a delta on
the adapter's own matrices is no delta of the map.
"""

from __future__ import annotations

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


def virtual_tokens(model: nn.Module) -> int:
    """How many virtual tokens PEFT may put in front of the batch's own (prompt tuning, P-tuning); 0 without PEFT."""
    # Those of prefix tuning are counted as well, but are keys and values: hidden states are no longer than the batch.
    for module in modules_of(model):
        if vars(module).get("_is_prompt_learning"):
            config: Any = getattr(module, "active_peft_config", None)
            return int(getattr(config, "num_virtual_tokens", 0) or 0)
    return 0
