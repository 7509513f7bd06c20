"""`lfu-reg inspect`: what would be hooked, and the memory that the components take; nothing is allocated."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from lfu_reg.auxiliaries import LoRADeltas
from lfu_reg.cli.errors import Unusable
from lfu_reg.cli.workloads import Setting, make_workload
from lfu_reg.model.layers import LayerChoice, choose_layers
from lfu_reg.model.linears import TargetModules, find_linears, linear_sizes

SCHEMA = "lfu-reg inspect 1"
MASTER = 4  # bytes of a component: float32


def inspect(
    setting: Setting, layers: LayerChoice = "all", target_modules: TargetModules = "all-linear", rank: int = 8
) -> dict[str, Any]:
    """Layers, linear maps, and what each auxiliary takes; ready for JSON.

    Args:
        setting: of the model, whose batch and tokens give the size of the hidden states that are kept.
        layers: as LfURegularizer takes them.
        target_modules: as LoRADeltas takes them.
        rank: of LoRA's deltas.

    Raises:
        Unusable: for a model or a choice that there is not.
    """
    model = make_workload(setting if setting.is_own else replace(setting, device="meta")).model
    try:
        chosen = choose_layers(model, layers)
        linears = find_linears(chosen, target_modules)
        LoRADeltas(rank=rank)
    except (ValueError, TypeError) as error:
        raise Unusable(str(error)) from error
    hidden = _hidden_size(model)
    maps: list[dict[str, Any]] = []
    for name, linear in linears.items():
        n_in, n_out = linear_sizes(linear) or (0, 0)
        maps.append({"name": name, "in": n_in, "out": n_out, "parameters": rank * (n_in + n_out)})
    trained = [p for p in model.parameters() if p.requires_grad]
    states = None if hidden is None else len(chosen) * setting.batch * setting.tokens * hidden
    itemsize = next(model.parameters()).element_size()
    sizes = {
        "steering": None if hidden is None else len(chosen) * hidden,
        "lora": sum(entry["parameters"] for entry in maps),
        "weights": sum(p.numel() for p in trained),
    }
    return {
        "schema": SCHEMA,
        "model": {
            "name": setting.model,
            "class": type(model).__name__,
            "parameters": sum(p.numel() for p in model.parameters()),
            "trainable": sum(p.numel() for p in trained),
            "hidden": hidden,
        },
        "layers": [
            {"name": name, "class": type(layer).__name__, "parameters": sum(p.numel() for p in layer.parameters())}
            for name, layer in chosen.items()
        ],
        "linears": maps,
        "clean_states_mb": None if states is None else round(states * itemsize / 1e6, 3),
        "auxiliaries": {
            key: {
                "parameters": size,
                "mb": None if size is None else _megabytes(key, size, maps, rank, trained),
            }
            for key, size in sizes.items()
        },
    }


def _megabytes(key: str, size: int, maps: list[dict[str, Any]], rank: int, trained: list[nn.Parameter]) -> float:
    """Components and their gradients, as they live at the same time in a step."""
    if key == "steering":
        return round(2 * MASTER * size / 1e6, 3)
    if key == "lora":  # A has no gradient
        size += rank * sum(int(entry["out"]) for entry in maps)
        return round(MASTER * size / 1e6, 3)
    return round(
        2 * sum(p.nbytes for p in trained) / 1e6, 3
    )  # the delta and the moved weight; g is SFT's gradient, there anyway


def _hidden_size(model: nn.Module) -> int | None:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "hidden_size", None)
