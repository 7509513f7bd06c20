"""The hidden states that the paper compares, as modules of a decoder of transformers.

embeddings ──► block 1 ──► ... ──► block n-1 ──► block n ──► norm
    0             1                   n-1                      n      numbers in `output_hidden_states`
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from methods.base import IGNORED, hidden_state
from torch import Tensor, nn

from lfu_reg.model.layers import choose_layers

PARTS = ("early", "middle", "late")


def numbers_of(part: str, blocks: int) -> list[int]:
    """Block numbers, from 1, of Table 5b's groups: on 32 blocks 1 to 11, 12 to 22, 23 to 32."""
    third = PARTS.index(part)
    first, last = (-(-k * blocks // 3) for k in (third, third + 1))
    return list(range(first + 1, last + 1))


def names_of(model: nn.Module, states: str, part: str = "all") -> list[str]:
    """Names of the modules whose outputs are the states.

    Args:
        model: a decoder of transformers, wrapped or not.
        states: "hidden-states" or "blocks" (see `Protocol`).
        part: "all", "early", "middle" or "late".

    Raises:
        ValueError: if the embeddings or the last norm cannot be found.
    """
    blocks = list(choose_layers(model, "all"))
    numbered: dict[int, str] = dict(enumerate(blocks, start=1))
    if states == "hidden-states":
        numbered = {0: _embeddings(model), **numbered, len(blocks): _last_norm(model, blocks[0])}
    if part == "all":
        return list(numbered.values())
    return [numbered[i] for i in numbers_of(part, len(blocks))]


def _embeddings(model: nn.Module) -> str:
    embeddings = model.get_input_embeddings()
    return next(name for name, module in model.named_modules() if module is embeddings)


def _last_norm(model: nn.Module, first_block: str) -> str:
    trunk = first_block.rsplit(".", 2)[0]
    names = [name for name, _ in model.get_submodule(trunk).named_children() if "norm" in name]
    if len(names) != 1:
        raise ValueError(
            f"{type(model).__name__}: found {len(names)} norms after the blocks, and the hidden states of transformers "
            "end with one. Use --switch states=blocks."
        )
    return f"{trunk}.{names[0]}"


@contextmanager
def collected(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """The outputs of the modules, in their order of the forward."""
    states: list[Tensor] = []
    with ExitStack() as hooks:
        for module in modules:
            keep = module.register_forward_hook(lambda m, args, output: states.append(hidden_state(output)))
            hooks.callback(keep.remove)
        yield states


def distance(moving: Sequence[Tensor], fixed: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Mean square over response tokens and hidden dimension, then over states; `fixed` gets no gradient.

    Args:
        moving: states of the batch.
        fixed: states of this batch or of another one; both are cut to what they share, and one sample is broadcast.
        labels: of the batch.
    """
    return torch.stack([_square(h, f.detach(), labels) for h, f in zip(moving, fixed, strict=True)]).mean()


def _square(moving: Tensor, fixed: Tensor, labels: Tensor) -> Tensor:
    samples = moving.shape[0] if fixed.shape[0] == 1 else min(moving.shape[0], fixed.shape[0])
    length = min(moving.shape[1], fixed.shape[1])
    moving, mask = moving[:samples, :length], labels[:samples, :length] != IGNORED
    fixed = fixed[:samples, :length].expand_as(moving)
    return (moving[mask] - fixed[mask]).square().mean() if mask.any() else moving.sum() * 0.0
