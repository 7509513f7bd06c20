"""One training step (forward, backward, gradients dropped) per method, by key."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lfu_reg.cli import opponents, rivals
from lfu_reg.cli.errors import Unusable
from lfu_reg.cli.subjects import Subject
from lfu_reg.hooks.early_exit import EarlyExit
from lfu_reg.model.layers import choose_layers
from lfu_reg.model.outputs import HIDDEN_STATE, get, locate
from lfu_reg.regularizer import LfURegularizer

BLOCKS = "blocks"
LFU = {"steering": "LfU steering", "lora": "LfU LoRA", "weights": "LfU weights"}
LATE = {"steering-late": "LfU steering, last third of layers", "lora-late": "LfU LoRA, last third of layers"}
LABELS = {
    "sft": "SFT",
    **LFU,
    **LATE,
    "retained": "LfU steering, graph retained",
    "literal-steering": "literal steering, 3 forwards",
    "literal-lora": "literal LoRA, 3 forwards",
    "authors-lora": "authors' LoRA procedure",
    "authors-steering": "authors' steering procedure",
    "neftune": "NEFTune",
    "r-drop": "R-Drop",
    "sam": "SAM",
}
DEFAULT = ("sft", *LFU)
# These read the model's configuration, embeddings or logits, and the batch by its keys.
OF_TRANSFORMERS = ("literal-steering", "authors-lora", "authors-steering", "neftune", "r-drop")


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        key: its name on the command line.
        label: its name in tables.
        run: does `steps` training steps.
        steps: more than one where a step's cost depends on its number (every=k).
        model: what `run` trains.
        regularizer: of LfU's own methods.
    """

    key: str
    label: str
    run: Callable[[], None]
    steps: int
    model: nn.Module
    regularizer: LfURegularizer | None = None


def chosen_keys(given: str) -> list[str]:
    """Keys from a comma-separated list, SFT first.

    Raises:
        Unusable: for a key that does not exist; the message lists those that do.
    """
    keys = list(LABELS) if given == "all" else [key.strip() for key in given.split(",") if key.strip()]
    unknown = [key for key in keys if key not in LABELS]
    if unknown or not keys:
        raise Unusable(f"--methods {given}: allowed are 'all' and a comma-separated list of {', '.join(LABELS)}.")
    return list(dict.fromkeys(["sft", *keys]))


def check_keys(keys: Sequence[str], subject: Subject) -> None:
    """Raise for methods that are written for models of transformers, where the model is another one.

    Raises:
        Unusable: with the methods that are in question.
    """
    if hasattr(subject.model, "config") and isinstance(subject.batch, Mapping):
        return
    if wrong := [key for key in keys if key in OF_TRANSFORMERS]:
        raise Unusable(
            f"--methods: {', '.join(wrong)} need a model of transformers and a batch with its keys, and this is a "
            f"{type(subject.model).__name__} with a {type(subject.batch).__name__}. Leave them out."
        )


def make_method(key: str, subject: Subject, *, compiled: bool = False) -> Method:
    """The method of that key, on a module tree of its own around the subject's parameters."""
    if key in LFU:
        return lfu_method(key, LFU[key], subject, {}, compiled=compiled)
    if key in LATE:
        auxiliary = key.removesuffix("-late")
        return lfu_method(auxiliary, LATE[key], subject, {"layers": "late"}, key=key, compiled=compiled)
    if key == "retained":
        return lfu_method("steering", LABELS[key], subject, {"strategy": "retained"}, key=key, compiled=compiled)
    own = shared_copy(subject.model)
    if compiled:
        own.compile()
    losses: dict[str, Callable[..., Tensor]] = {
        "literal-steering": opponents.three_forwards,
        "literal-lora": opponents.three_forwards_lora,
        "authors-lora": opponents.authors_lora,
        "neftune": rivals.neftune,
        "r-drop": rivals.r_drop,
    }
    if key == "authors-steering":
        losses[key] = opponents.AuthorsSteering(own)

    def run() -> None:
        if key == "sft":
            subject.sft_loss(own, subject.batch).backward()  # type: ignore[no-untyped-call]
        elif key == "sam":
            rivals.sam_step(own, subject.batch, subject.sft_loss)
        else:
            losses[key](own, subject.batch, subject.sft_loss).backward()  # type: ignore[no-untyped-call]
        own.zero_grad(set_to_none=True)

    return Method(key, LABELS[key], run, 1, own)


def lfu_method(
    auxiliary: str,
    label: str,
    subject: Subject,
    options: Mapping[str, Any],
    *,
    key: str | None = None,
    compiled: bool = False,
) -> Method:
    """A step of LfURegularizer with the given options."""
    own = shared_copy(subject.model)
    try:
        regularizer = LfURegularizer(own, auxiliary, **options)
    except ValueError as error:
        raise Unusable(f"LfU cannot be attached to this model: {error}") from error
    if compiled:
        own.compile()
    steps = int(options.get("every", 1))

    def run() -> None:
        for _ in range(steps):
            regularizer(own, subject.batch, subject.sft_loss).backward()  # type: ignore[no-untyped-call]
            own.zero_grad(set_to_none=True)

    return Method(key or auxiliary, label, run, steps, own, regularizer)


def blocks_alone(subject: Subject) -> Method:
    """Forward and backward of the blocks and nothing above: what a second pass through all of them takes."""
    own = shared_copy(subject.model)
    blocks = choose_layers(own, "all")
    ran: list[nn.Module] = []
    handles = [block.register_forward_hook(lambda m, a, o: ran.append(m)) for block in blocks.values()]
    with torch.no_grad():
        subject.sft_loss(own, subject.batch)
    for handle in handles:
        handle.remove()
    if not ran:
        raise Unusable("The loss runs none of the model's blocks, so there is nothing for LfU to compare.")
    last, calls = ran[-1], ran.count(ran[-1])
    kept: list[Tensor] = []

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        path = locate(output, HIDDEN_STATE)
        assert path is not None
        kept.append(get(output, path))
        if len(kept) == calls:
            raise EarlyExit

    last.register_forward_hook(leave)

    def run() -> None:
        kept.clear()
        with suppress(EarlyExit):
            subject.sft_loss(own, subject.batch)
        hidden = kept[-1]
        kept.clear()
        hidden.backward(torch.ones_like(hidden))  # type: ignore[no-untyped-call]
        own.zero_grad(set_to_none=True)

    return Method(BLOCKS, "blocks alone", run, 1, own)


def shared_copy(model: nn.Module) -> nn.Module:
    """A module tree of its own, for its own hooks, around the same parameters and buffers."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
