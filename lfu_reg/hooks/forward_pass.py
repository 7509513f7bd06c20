"""One pass through the model: what it asks of the hooks (`ForwardPass`), and what they note down of it (`Record`).

A tap, or a component that is added, puts another tensor in the place of an output. Where the model goes on to write in
place into that output's base, another view of it, or the output itself under another name, values and history part: a
`WriteWatch` tells.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lfu_reg.auxiliaries.base import Tokens
from lfu_reg.hooks.taps import Gate
from lfu_reg.model.patching import Patch
from lfu_reg.model.tokens import TokenMasks


class WriteWatch:
    """Watches one output from now on, without keeping its memory alive: checkpointed blocks free theirs at once."""

    def __init__(self, name: str, output: Tensor) -> None:
        self.name = name
        self._version = output._version
        # A version counter belongs to all tensors on the same memory, and stays when that is taken from one of them.
        self._probe = output.detach()
        self._probe.data = output.new_empty(0)

    @staticmethod
    def can_watch(output: Tensor) -> bool:
        """Not a subclass, which need not let go of its memory, nor what inference_mode made, which has no counter."""
        return type(output) is Tensor and not output.is_inference()

    @property
    def was_written(self) -> bool:
        """Whether the output, its base or another of its views has been written to since."""
        return self._probe._version != self._version


@dataclass
class State:
    """One captured hidden state h_{l,t}."""

    name: str  # of the layer
    hidden: Tensor  # as the layer returned it
    tokens: Tokens  # that count
    watch: WriteWatch | None = None  # whether the model writes over what was returned; None where none can tell
    is_copy: bool = False  # so that `hidden` is safe from that

    def of(self, samples: Tensor | None) -> Tensor:
        """The hidden state of the given samples (numbers along the batch dimension); None is all of them."""
        return self.hidden if samples is None else self.hidden.index_select(0, samples.to(self.hidden.device))

    @property
    def is_written_over(self) -> bool:
        """Whether the model has written over what the layer returned."""
        return self.watch is not None and self.watch.was_written


@dataclass(frozen=True)
class Entry:
    """What a stack of layers was called with, before any perturbation could reach it."""

    name: str
    call: int  # how often it had been called before in this pass
    tensors: tuple[Tensor, ...]  # copies of what must be the same in pass 2


@dataclass
class Record:
    """What the hooks note down of a pass."""

    states: list[State] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)  # how often the modules were called that `entries` are of
    fired: Counter[str] = field(default_factory=Counter)  # how often each hooked module ran with gradients
    compiled: bool = False  # whether any of them ran in a region of torch.compile
    float16: bool = False
    goes_once: bool = False  # whether its graph is for one backward: activations saved elsewhere, selective checkpoints
    in_thread: bool = False  # whether the layers ran in another thread than the loss function
    old_backward_hooks: list[str] = field(default_factory=list)  # modules with hooks of `register_backward_hook`
    watched: list[WriteWatch] = field(default_factory=list)  # outputs in whose place a tap put another tensor

    @property
    def batch_size(self) -> int:
        """Length of the captured states along their first dimension."""
        return self.states[0].hidden.shape[0]

    def is_empty(self) -> bool:
        """Whether no token of any captured state counts."""
        return all(state.tokens.is_empty() for state in self.states)


@dataclass(frozen=True)
class ForwardPass:
    """One pass through the model."""

    tokens: TokenMasks
    observe: bool = False  # tap the sites, so that the backward of this pass collects the ascent direction
    apply: bool = False  # run with the auxiliary components in place
    # Keep hidden states: attached to the graph or not; "cloned" is attached, and safe from being overwritten.
    capture: Literal["detached", "attached", "cloned"] | None = "detached"
    patches: Sequence[Patch] = ()
    leave: Literal["auto"] | bool = False  # the forward after so many states; "auto" where no code would be cut off
    leave_after: int = 0
    quiet_tail: bool = False  # what runs after them is in no graph
    gate: Gate = field(default_factory=Gate)
    # On which taps depend that would be in no graph otherwise.
    anchor: Tensor = field(
        default_factory=lambda: torch.zeros((), dtype=torch.float32, device="cpu", requires_grad=True)
    )
    record: Record = field(default_factory=Record)
    thread: int = field(default_factory=threading.get_ident)  # that calls the loss function

    def is_elsewhere(self) -> bool:
        """Whether this is another thread: the model runs in a worker's."""
        return threading.get_ident() != self.thread
