"""What runs in a forward of an untouched model: shapes of the layers' outputs, and the linear maps that are called.

The oracle gets its token masks from these shapes, and the library's LoRA sites are compared with these calls: neither
is taken from the library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.support.oracle_parts import hidden_of


def is_linear_map(module: nn.Module) -> bool:
    """Linear, Conv1D, and what ibert has instead; not a block-diagonal map, which only looks like one."""
    kind = type(module).__name__
    return (isinstance(module, (nn.Linear, Conv1D)) and "GroupedLinear" not in kind) or kind == "QuantLinear"


@dataclass
class Observation:
    """Of one forward.

    Attributes:
        shapes: of each layer's hidden state, by name, of every layer that ran.
        calls: how many hidden states there were in all.
        linears: names of the linear maps in the layers that were called.
        without_gradients: layers that ran without gradients.
    """

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    calls: int = 0
    linears: set[str] = field(default_factory=set)
    without_gradients: set[str] = field(default_factory=set)


def observe(model: nn.Module, layers: Sequence[str], run: Callable[[nn.Module], Any]) -> Observation:
    """Run `run(model)` and note what happens in the layers."""
    seen = Observation()

    def on_layer(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen.shapes[name] = tuple(hidden_of(output).shape)
            seen.calls += 1
            if not torch.is_grad_enabled():
                seen.without_gradients.add(name)

        return hook

    def on_linear(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if torch.is_grad_enabled():
                seen.linears.add(name)

        return hook

    with ExitStack() as stack:
        for name in layers:
            handle = model.get_submodule(name).register_forward_hook(on_layer(name))
            stack.callback(handle.remove)
        inside = {id(module) for name in layers for module in model.get_submodule(name).modules()}
        for name, module in model.named_modules():
            if is_linear_map(module) and id(module) in inside:
                stack.callback(module.register_forward_hook(on_linear(name)).remove)
        run(model)
    return seen


def mask_from(seen: Observation, axis: Callable[[str], int]) -> Callable[[Mapping[str, Any], str], Tensor | None]:
    """The contract's token mask for layers of the observed shapes: labels, else attention mask, else every token."""

    def mask(batch: Mapping[str, Any], layer: str) -> Tensor | None:
        if layer not in seen.shapes or axis(layer) != -1:
            return None
        tokens = seen.shapes[layer][:-1]
        parts = layer.split(".")
        is_encoder = "encoder" in parts and any("decoder" in other.split(".") for other in seen.shapes)
        labels, attention = batch.get("labels"), batch.get("attention_mask")
        counted = [] if is_encoder or labels is None else [labels != -100]
        counted += [] if attention is None else [attention != 0]
        return next((found for some in counted if (found := _laid_over(some, tokens)) is not None), None)

    return mask


def _laid_over(some: Tensor, tokens: tuple[int, ...]) -> Tensor | None:
    if some.dim() != 2:
        return None
    rows, columns = some.shape
    if tokens == (rows, columns):
        return some
    if tokens == (columns, rows):
        return some.t()
    if tokens in ((rows * columns,), (1, rows * columns)):
        return some.reshape(tokens)
    if len(tokens) == 3 and tokens[:2] == (rows, columns):
        return torch.stack([some] * tokens[2], dim=-1)
    if len(tokens) == 3 and tokens[1:] == (rows, columns):
        return torch.stack([some] * tokens[0])
    return None
