"""Choose the layers whose hidden states are kept consistent, on any nn.Module.

Blocks are found by structure: the outermost repeated containers, so encoder and decoder stacks both, and not the
experts or sub-layers inside a block. Names decide nothing. A model without blocks has its single layers instead.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias, cast

from torch import nn

from lfu_reg.model.leaf_layers import leaf_layers, one_block_stages
from lfu_reg.model.names import did_you_mean, listed, shown

LayerChoice: TypeAlias = str | int | slice | Sequence[int] | Sequence[str] | Callable[[str, nn.Module], bool]

THIRDS = ("early", "middle", "late")
WORDS = ("all", *THIRDS)
ALLOWED = (
    "Allowed are 'all', 'early', 'middle', 'late', an index, a list of indices, a slice, the name of a module (not the "
    "module), a list of names, a regular expression, or a callable of (name, module)."
)

NO_BLOCKS = (
    "{model} has no repeated blocks, so its layers are the modules with weights of their own, without embeddings, "
    "norms and the last one: {layers}. Name these or others with layers=[...], and this message goes."
)
NO_SUBMODULES = (
    "{model} has no submodules: what it returns is the output already, and there is no hidden state to compare. Attach "
    "to the whole model that it is a part of, or write its layers as modules of their own (nn.ModuleList, "
    "nn.Sequential)."
)
ONE_BLOCK = (
    "These stages of {model} have one block, which layers={choice!r} leaves out beside stacks of several: {stages}. To "
    "have them, give layers=[...] with all names, a regular expression or a callable of (name, module)."
)


def is_preset(choice: LayerChoice) -> bool:
    """Whether a choice is one of the words that fit every model, in any case, and names or numbers no layer."""
    return isinstance(choice, str) and choice.lower() in WORDS


def choose_layers(
    model: nn.Module, choice: LayerChoice = "all", tell: Callable[[str, str], None] | None = None
) -> dict[str, nn.Module]:
    """The chosen layers by full name, in the order of `model.named_modules()`.

    "all"; "early", "middle" or "late" (the paper's thirds, Table 5b, of every stack); an index, a list of indices or a
    slice into all blocks; a module name or a list of names (a name may leave out leading parts, as in PEFT's
    `target_modules`); a regular expression that matches whole names; a callable of (name, module). Where the choice is
    a guess, `tell` gets a kind and a message.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    if callable(choice) and not isinstance(choice, (str, type, nn.Module)):
        chosen = [name for name, module in modules.items() if choice(name, module)]
        if not chosen:
            raise _nothing("the callable given as layers chooses no module", modules, model)
    elif isinstance(choice, str) and not is_preset(choice):
        chosen = _match(choice, modules, model)
    else:
        if isinstance(choice, Iterable) and not isinstance(choice, str):
            choice = cast("list[int]", list(choice))
        if isinstance(choice, list) and choice and all(isinstance(name, str) for name in choice):
            chosen = [found for name in choice for found in _match(name, modules, model, regex=False)]
        else:
            stacks = find_stacks(model) or [_leaf_layers(model, modules, choice)]
            chosen = _by_position(choice, stacks, model)
            if tell is not None:
                _tell_guesses(model, choice, stacks, tell)
    return {name: module for name, module in modules.items() if name in set(chosen)}


def _leaf_layers(model: nn.Module, modules: dict[str, nn.Module], choice: object) -> list[str]:
    if leaves := leaf_layers(model):
        return leaves
    raise ValueError(
        f"{type(model).__name__} has neither repeated blocks nor several modules with weights, so layers="
        f"{shown(choice)} cannot be resolved: what its one module returns is the output already. Name the layers to "
        "compare: layers=['...'], a regular expression or a callable of (name, module); or attach to the whole model "
        f"that this is a part of. Its modules are: {listed(modules, 40)}."
        if modules
        else NO_SUBMODULES.format(model=type(model).__name__)
    )


def _tell_guesses(model: nn.Module, choice: object, stacks: list[list[str]], tell: Callable[[str, str], None]) -> None:
    name = type(model).__name__
    if not find_stacks(model):
        tell("no blocks", NO_BLOCKS.format(model=name, layers=listed(stacks[0], 40)))
    elif isinstance(choice, str) and (stages := one_block_stages(model, stacks)):
        tell("one block", ONE_BLOCK.format(model=name, choice=choice, stages=listed(stages, 40)))


def find_stacks(model: nn.Module) -> list[list[str]]:
    """Names of the blocks of every outermost repeated container of `model`, stack by stack."""
    stacks = list(_stacks(model, ""))
    # A classifier head is often a Sequential of bare Linears: where there are real blocks, it is no stack of its own.
    stacks = [s for s in stacks if any(list(model.get_submodule(name).children()) for name in s)] or stacks
    # A list of one block is a stack only in a model that has no longer one.
    return [stack for stack in stacks if len(stack) > 1] or stacks


def _stacks(module: nn.Module, prefix: str) -> Iterable[list[str]]:
    blocks = _repeated_children(module)
    if blocks:
        names = [f"{prefix}{name}" for name in blocks]
        children = [module.get_submodule(name) for name in blocks]
        if all(isinstance(child, nn.ModuleList) for child in children):  # a list of lists: the blocks are inside
            yield [
                f"{name}.{child}"
                for name, blocks in zip(names, children, strict=True)
                for child, _ in blocks.named_children()
            ]
        else:
            yield names
        return
    for name, child in module.named_children():
        yield from _stacks(child, f"{prefix}{name}.")


def _repeated_children(module: nn.Module) -> list[str]:
    """Children of a list-like container that are the repeated blocks, or none."""
    numbered = isinstance(module, nn.ModuleDict) and all(map(str.isdigit, module))  # as torchtitan has them
    if not isinstance(module, (nn.ModuleList, nn.Sequential)) and not numbered:
        return []
    with_weights = {
        name: child for name, child in module.named_children() if next(child.parameters(), None) is not None
    }
    if not (classes := Counter(type(child) for child in with_weights.values())):
        return []
    (kind, count), *_ = classes.most_common(1)
    if count > 1:
        # Hybrids mix block classes in one list (attention and state-space blocks): there everything with weights is a
        # block. In a flat Sequential of Conv, Norm, ReLU only the most frequent class is.
        if isinstance(module, nn.Sequential):
            return [name for name, child in with_weights.items() if type(child) is kind]
        return list(with_weights)
    composite = all(list(child.children()) for child in with_weights.values())
    return list(with_weights) if isinstance(module, nn.ModuleList) and (composite or len(module) == 1) else []


def _by_position(choice: object, stacks: list[list[str]], model: nn.Module) -> list[str]:
    blocks = [name for stack in stacks for name in stack]
    if isinstance(choice, str):
        if choice.lower() == "all":
            return blocks
        return [name for stack in stacks for name in _third(stack, THIRDS.index(choice.lower()))]
    if isinstance(choice, slice):
        chosen = blocks[choice]
        if not chosen:
            raise ValueError(f"layers={choice} selects nothing: {type(model).__name__} has {len(blocks)} blocks.")
        return chosen
    indices = [choice] if isinstance(choice, int) else choice
    if not isinstance(indices, list) or not indices or any(type(i) is not int for i in indices):
        raise TypeError(f"layers={shown(choice)} is not a choice of layers. {ALLOWED}")
    wrong = [i for i in indices if not -len(blocks) <= i < len(blocks)]
    if wrong:
        raise ValueError(
            f"layers={shown(choice)}: {type(model).__name__} has {len(blocks)} blocks, so indices run from "
            f"{-len(blocks)} to {len(blocks) - 1}; there is no {wrong[0]}. The blocks are {_folded(stacks)}."
        )
    return [blocks[i] for i in indices]


def _third(stack: list[str], third: int) -> list[str]:
    """The paper's thirds, the larger ones first (11, 11 and 10 of 32); each has a layer, also of a stack of one."""
    first, last = (math.ceil(part * len(stack) / 3) for part in (third, third + 1))
    return stack[min(first, len(stack) - 1) : last]


def _match(pattern: str, modules: dict[str, nn.Module], model: nn.Module, *, regex: bool = True) -> list[str]:
    # A full name means that module, also where it is the ending of others.
    found = [pattern] if pattern in modules else [name for name in modules if name.endswith(f".{pattern}")]
    why = "matches no module"
    if not found and regex:
        try:
            found = [name for name in modules if re.fullmatch(pattern, name)]
        except re.error as error:
            why = f"is no regular expression ({error}) and matches no module"
    if not found:
        raise _nothing(f"layers={pattern!r} {why}", modules, model, pattern)
    return found


def _nothing(what: str, modules: dict[str, nn.Module], model: nn.Module, typed: str | None = None) -> ValueError:
    if not modules:
        return ValueError(NO_SUBMODULES.format(model=type(model).__name__))
    stacks = find_stacks(model)
    there = f"Its blocks are {_folded(stacks)}." if stacks else f"Its modules are {listed(modules, 40)}."
    near = did_you_mean(typed, [*WORDS, *modules])
    return ValueError(f"{what} of {type(model).__name__}.{near} {there} {ALLOWED}")


def _folded(stacks: Iterable[list[str]]) -> str:
    """The blocks of every stack by its first and last one."""
    return ", ".join(f"{stack[0]} to {stack[-1]} ({len(stack)})" if stack[1:] else stack[0] for stack in stacks)


def encoder_and_decoder(model: nn.Module, names: Iterable[str]) -> tuple[set[str], set[str]]:
    """Which of the named layers are the encoder's and which the decoder's, where the model has layers of both."""
    names = list(names)
    of_model = {part for name in [*names, *(n for s in find_stacks(model) for n in s)] for part in name.split(".")}
    if not {"encoder", "decoder"} <= of_model:
        return set(), set()
    decoder = {name for name in names if "decoder" in name.split(".")}
    return {name for name in names if "encoder" in name.split(".")} - decoder, decoder
