"""What layers="all" means beside stacks of blocks: the layers of models without any, and stages of a single block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn
from torch.nn.parameter import is_lazy

from lfu_reg.model.linears import linear_sizes


def leaf_layers(model: nn.Module) -> list[str]:
    """Names of the modules with weight matrices of their own, but for embeddings and the last one, the head."""
    names = {id(module): name for name, module in reversed([*_weighted(model, "")])}  # the first name of each
    return [*reversed(names.values())][:-1]


def one_block_stages(model: nn.Module, stacks: Sequence[Sequence[str]]) -> list[str]:
    """Names of blocks that are alone in their container, and of the class of blocks in the stacks."""
    blocks = {model.get_submodule(name) for stack in stacks for name in stack}
    classes = {type(block) for block in blocks if list(block.children())}
    return list(_lonely(model, "", blocks, classes))


def _lonely(module: nn.Module, prefix: str, blocks: set[nn.Module], classes: set[type]) -> Iterator[str]:
    with_weights = [child for child in module.children() if next(child.parameters(), None) is not None]
    alone = isinstance(module, (nn.ModuleList, nn.Sequential)) and len(with_weights) == 1
    for name, child in module.named_children():
        if child in blocks:
            continue
        if alone and type(child) in classes:
            yield f"{prefix}{name}"
        else:
            yield from _lonely(child, f"{prefix}{name}.", blocks, classes)


def _weighted(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if isinstance(child, (nn.ParameterList, nn.ParameterDict, nn.Embedding, nn.EmbeddingBag)):
            continue
        if _has_weights(child):
            yield f"{prefix}{name}", child
        else:
            yield from _weighted(child, f"{prefix}{name}.")


def _has_weights(module: nn.Module) -> bool:
    # Adapters, parametrizations and packed weights leave a module without a matrix that is a parameter of its own.
    if {"base_layer", "parametrizations"} & module._modules.keys() or linear_sizes(module) is not None:
        return True
    return any(p is not None and (is_lazy(p) or p.dim() > 1) for p in module._parameters.values())
