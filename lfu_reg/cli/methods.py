"""One training step (forward, backward, gradients dropped) per method, by key."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lfu_reg.auxiliaries import AuxiliaryName
from lfu_reg.cli.errors import Unusable
from lfu_reg.cli.published import PROCEDURES
from lfu_reg.cli.workloads import LossFunction, Workload
from lfu_reg.hooks.early_exit import EarlyExit
from lfu_reg.model.layers import choose_layers
from lfu_reg.model.names import did_you_mean
from lfu_reg.model.outputs import HIDDEN_STATE, get, locate
from lfu_reg.regularizer import LfURegularizer
from lfu_reg.step.strength import FIRST_STEPS

BLOCKS = "blocks"
LFU = {"steering": "LfU steering", "lora": "LfU LoRA", "weights": "LfU weights"}
# Key: auxiliary, label, settings.
VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "steering-lam": ("steering", "LfU steering, alpha and lam given", {"alpha": 0.5, "lam": 5.0}),
    "steering-late": ("steering", "LfU steering, last third of layers", {"layers": "late"}),
    "lora-late": ("lora", "LfU LoRA, last third of layers", {"layers": "late"}),
    "steering-one": ("steering", "LfU steering, one backward", {"strategy": "one-backward"}),
    "lora-one": ("lora", "LfU LoRA, one backward", {"strategy": "one-backward"}),
    "weights-one": ("weights", "LfU weights, one backward", {"strategy": "one-backward"}),
    "retained": ("steering", "LfU steering, graph retained", {"strategy": "retained"}),
}
# A step in the middle of training: what is measured at the first ten steps only is over.
MID_TRAINING = 11
DEFAULT = ("sft", *LFU)


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


def labels() -> dict[str, str]:
    """Names of all methods in tables, by their keys on the command line."""
    variants = {key: label for key, (_, label, _) in VARIANTS.items()}
    return {"sft": "SFT", **LFU, **variants, **{key: other.label for key, other in PROCEDURES.items()}}


def chosen_keys(given: str) -> list[str]:
    """Keys from a comma-separated list, SFT first.

    Raises:
        Unusable: for a key that does not exist; the message lists those that do.
    """
    known = labels()
    keys = list(known) if given == "all" else [key.strip() for key in given.split(",") if key.strip()]
    unknown = [key for key in keys if key not in known]
    if unknown or not keys:
        near = did_you_mean(next(iter(unknown), None), known, most=1)
        raise Unusable(f"--methods {given}: allowed are 'all' and a comma-separated list of {', '.join(known)}.{near}")
    return list(dict.fromkeys(["sft", *keys]))


def check_keys(keys: Sequence[str], workload: Workload) -> None:
    """Raise for methods that are written for models of transformers, where the model is another one.

    Raises:
        Unusable: with the methods that are in question.
    """
    if hasattr(workload.model, "config") and isinstance(workload.batch, Mapping):
        return
    if wrong := [key for key in keys if key in PROCEDURES and PROCEDURES[key].of_transformers]:
        raise Unusable(
            f"--methods: {', '.join(wrong)} need a model of transformers and a batch with its keys, and this is a "
            f"{type(workload.model).__name__} with a {type(workload.batch).__name__}. Leave them out."
        )


def make_method(key: str, workload: Workload, *, compiled: bool = False) -> Method:
    """The method of that key, on a module tree of its own around the workload's parameters."""
    if key in LFU:
        return lfu_method(key, LFU[key], workload, {}, compiled=compiled)
    if key in VARIANTS:
        auxiliary, label, settings = VARIANTS[key]
        return lfu_method(auxiliary, label, workload, settings, key=key, compiled=compiled)
    own = shared_copy(workload.model)
    if compiled:
        own.compile()
    loss = PROCEDURES[key].make(own) if key in PROCEDURES else _sft

    def run() -> None:
        loss(own, workload.batch, workload.sft_loss).backward()  # type: ignore[no-untyped-call]
        own.zero_grad(set_to_none=True)

    return Method(key, labels()[key], run, 1, own)


def _sft(model: nn.Module, batch: Any, sft_loss_fn: LossFunction) -> Tensor:
    return sft_loss_fn(model, batch)


def go_to_mid_training(regularizer: LfURegularizer) -> None:
    """Let the next step be one of the many at which nothing is checked or measured."""
    state = regularizer.state_dict()
    strength = {**state["strength"], "seen": FIRST_STEPS}
    regularizer.load_state_dict({**state, "step": MID_TRAINING, "strength": strength})


def lfu_method(
    auxiliary: str,
    label: str,
    workload: Workload,
    options: Mapping[str, Any],
    *,
    key: str | None = None,
    compiled: bool = False,
) -> Method:
    """A step of LfURegularizer with the given options."""
    own = shared_copy(workload.model)
    try:
        regularizer = LfURegularizer(own, cast(AuxiliaryName, auxiliary), **options)
    except ValueError as error:
        raise Unusable(f"LfU cannot be attached to this model: {error}") from error
    go_to_mid_training(regularizer)
    if compiled:
        own.compile()
    steps = 2 if options.get("strategy") == "one-backward" else int(options.get("every", 1))

    def run() -> None:
        for _ in range(steps):
            regularizer(own, workload.batch, workload.sft_loss).backward()  # type: ignore[no-untyped-call]
            own.zero_grad(set_to_none=True)

    return Method(key or auxiliary, label, run, steps, own, regularizer)


def blocks_alone(workload: Workload) -> Method:
    """Forward and backward of the blocks and nothing above: what a second pass through all of them takes."""
    own = shared_copy(workload.model)
    blocks = choose_layers(own, "all")
    ran: list[nn.Module] = []
    handles = [block.register_forward_hook(lambda m, a, o: ran.append(m)) for block in blocks.values()]
    with torch.no_grad():
        workload.sft_loss(own, workload.batch)
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
            workload.sft_loss(own, workload.batch)
        hidden = kept[-1]
        kept.clear()
        hidden.backward(torch.ones_like(hidden))  # type: ignore[no-untyped-call]
        own.zero_grad(set_to_none=True)

    return Method(BLOCKS, "blocks alone", run, 1, own)


def shared_copy(model: nn.Module) -> nn.Module:
    """A module tree of its own, for its own hooks, around the same parameters and buffers."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
