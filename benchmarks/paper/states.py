"""The hidden states that the paper compares, as modules of a decoder of transformers.

embeddings ──► block 1 ──► ... ──► block n-1 ──► block n ──► norm
    0             1                   n-1                      n      numbers in `output_hidden_states`
"""

from __future__ import annotations

from torch import nn

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
