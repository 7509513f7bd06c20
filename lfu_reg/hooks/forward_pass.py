"""One pass through the model: what it asks of the hooks (`ForwardPass`), and what they note down of it (`Record`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lfu_reg.auxiliaries.base import Tokens
from lfu_reg.hooks.inplace import WriteWatch
from lfu_reg.hooks.taps import Gate
from lfu_reg.model.patching import Patch
from lfu_reg.model.tokens import TokenMasks


@dataclass
class State:
    """One captured hidden state h_{l,t}.

    Attributes:
        name: the layer.
        hidden: its hidden state, as the layer returned it.
        tokens: the positions that count.
        watch: tells whether the model writes over what the layer returned; None where that cannot be told.
        is_copy: whether `hidden` is safe from that.
    """

    name: str
    hidden: Tensor
    tokens: Tokens
    watch: WriteWatch | None = None
    is_copy: bool = False

    def of(self, samples: Tensor | None) -> Tensor:
        """The hidden state of the given samples (numbers along the batch dimension); None is all of them."""
        return self.hidden if samples is None else self.hidden.index_select(0, samples.to(self.hidden.device))

    @property
    def is_written_over(self) -> bool:
        """Whether the model has written over what the layer returned."""
        return self.watch is not None and self.watch.was_written


@dataclass(frozen=True)
class Entry:
    """What a stack of layers was called with, before any perturbation could reach it.

    Attributes:
        name: the layer that was called.
        call: how often it had been called before in this pass.
        tensors: copies of what must be the same in pass 2.
    """

    name: str
    call: int
    tensors: tuple[Tensor, ...]


@dataclass
class Record:
    """What the hooks note down of a pass; nobody else writes to it.

    Attributes:
        states: what was captured, in order of execution.
        entries: what the stacks of layers were called with.
        fired: how often each hooked module ran with gradients.
        compiled: whether any of them ran in a region of torch.compile.
        float16: whether anything at the hooks ran in float16.
        saves_elsewhere: whether saved tensors went through somebody's hooks at a captured layer.
        old_backward_hooks: modules with hooks of `register_backward_hook`, which see an operation of ours.
        watched: outputs in whose place the model got another tensor on the same memory, for the sake of a tap.
    """

    states: list[State] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    fired: Counter[str] = field(default_factory=Counter)
    compiled: bool = False
    float16: bool = False
    saves_elsewhere: bool = False
    old_backward_hooks: list[str] = field(default_factory=list)
    watched: list[WriteWatch] = field(default_factory=list)

    @property
    def batch_size(self) -> int:
        """Length of the captured states along their first dimension."""
        return self.states[0].hidden.shape[0]

    def is_empty(self) -> bool:
        """Whether no token of any captured state counts."""
        return all(state.tokens.is_empty() for state in self.states)


def _anchor() -> Tensor:
    return torch.zeros((), dtype=torch.float32, device="cpu", requires_grad=True)


@dataclass(frozen=True)
class ForwardPass:
    """One pass through the model.

    Attributes:
        tokens: the batch's token masks.
        observe: tap the sites, so that the backward of this pass collects the ascent direction.
        apply: run with the auxiliary components in place.
        capture: keep hidden states: "detached", "attached" to the graph, "cloned" (attached, and safe from being
            overwritten), or None.
        patches: what stands in the place of parameters and forward methods during the pass.
        leave: leave the forward after the last state that is wanted: "never", where the way is "clear" of code that
            would be cut off, or "always".
        leave_after: how many states are wanted.
        quiet_tail: what runs after them is in no graph.
        gate: open while the library's own backward of the pass is running.
        anchor: leaf on which taps depend that would otherwise not be part of the graph.
        record: what the hooks note down.
    """

    tokens: TokenMasks
    observe: bool = False
    apply: bool = False
    capture: Literal["detached", "attached", "cloned"] | None = "detached"
    patches: Sequence[Patch] = ()
    leave: Literal["never", "clear", "always"] = "never"
    leave_after: int = 0
    quiet_tail: bool = False
    gate: Gate = field(default_factory=Gate)
    anchor: Tensor = field(default_factory=_anchor)
    record: Record = field(default_factory=Record)
