"""What PEFT's wrappers mean for hooks, token masks and replays. Read by duck typing: nothing of PEFT is imported.

An adapter layer wraps a layer of the model as its `base_layer` and returns what both make together. It counts as that
layer, as a whole: a delta on `base_layer` alone would be scaled with it (DoRA, IA3) or rotated (OFT), and a delta on
the adapter's own matrices is no delta of the map.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lfu_reg.module_walk import modules_of

# PEFT's forward takes these for itself: it hooks its layers for the length of the call, and the model inside never
# sees them. A replay of what is inside would leave them out, and an exception would leave PEFT's hooks behind.
_CONTEXT_ARGUMENTS = ("adapter_names", "alora_offsets")


def base_layer(module: nn.Module) -> nn.Module | None:
    """What an adapter layer wraps; None for every other module."""
    return module._modules.get("base_layer")


def innermost(module: nn.Module) -> nn.Module:
    """The module itself, or what is inside of the adapter layers around it."""
    while (inner := base_layer(module)) is not None:
        module = inner
    return module


def adds_to_its_base_layer(module: nn.Module) -> bool:
    """Whether an adapter layer returns base_layer(x) plus something that does not depend on the base layer's weight.

    True for LoRA (and AdaLoRA) on a linear map. DoRA and the other variants read the weight's length; IA3, OFT and the
    rest scale or rotate; a wrapper of a single parameter calls its module with another one.
    """
    if not hasattr(module, "lora_A") or hasattr(module, "parameter_name"):
        return False
    variants = getattr(module, "use_dora", None), getattr(module, "lora_variant", None)
    return not any(isinstance(variant, dict) and any(variant.values()) for variant in variants)


def virtual_tokens(model: nn.Module) -> int:
    """How many virtual tokens PEFT may put in front of the batch's own (prompt tuning, P-tuning); 0 without PEFT.

    Those of prefix tuning are counted as well, but are keys and values: its hidden states are no longer than the batch.
    """
    for module in modules_of(model):
        if vars(module).get("_is_prompt_learning"):
            config: Any = getattr(module, "active_peft_config", None)
            return int(getattr(config, "num_virtual_tokens", 0) or 0)
    return 0


def enters_a_context(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether a call of `module` hooks PEFT's layers until it returns (mixed batches, activated LoRA)."""
    if any(kwargs.get(argument) is not None for argument in _CONTEXT_ARGUMENTS):
        return True
    configs = getattr(module, "peft_config", None) if "special_peft_forward_args" in vars(module) else None
    return any(getattr(config, "alora_invocation_tokens", None) for config in (configs or {}).values())
