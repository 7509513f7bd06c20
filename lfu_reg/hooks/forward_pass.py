"""One pass through the model: what it asks of the hooks, and what they note down of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from lfu_reg.auxiliaries.base import Tokens
from lfu_reg.hooks.inplace import WriteWatch
from lfu_reg.model.patching import Replacement
from lfu_reg.model.tokens import TokenMasks
from lfu_reg.step.shared_backward import SharedPrefix


@dataclass
class State:
    """One captured hidden state h_{l,t}.

    Attributes:
        name: the layer.
        hidden: its hidden state, as the layer returned it.
        tokens: the positions that count.
        version: of `hidden` when it was captured; a later one means that the model wrote over it.
    """

    name: str
    hidden: Tensor
    tokens: Tokens
    version: int

    def of(self, samples: Tensor | None) -> Tensor:
        """The hidden state of the given samples (numbers along the batch dimension); None is all of them."""
        return self.hidden if samples is None else self.hidden.index_select(0, samples.to(self.hidden.device))


@dataclass
class Gate:
    """All that a tap knows of its pass: a reference to the pass and its states would be a cycle through the graph.

    Attributes:
        is_open: while the backward of the pass may collect gradients.
        finite: where it is asked for, whether each gradient collected is finite, as scalars that nobody has read.
    """

    is_open: bool = True
    finite: list[Tensor] | None = None


@dataclass
class Pass:
    """One pass through the model.

    Attributes:
        tokens: the batch's token masks.
        observe: tap the sites, so that the backward of this pass collects the ascent direction.
        apply: run with the auxiliary components in place.
        capture: keep hidden states: "detached", "attached" to the graph, "cloned" (attached, and safe from being
            overwritten), or None.
        stop_after: leave early after this many captured states.
        recording: False once the forward is over: hooks then run only to repeat it (activation checkpointing).
        gate: open while the backward of a tapped pass may collect gradients.
        states: what was captured, in order of execution.
        fired: how often each hooked module ran with gradients.
        compiled: whether any of them ran in a region of torch.compile.
        taps: the edges of the graph at which taps wait for gradients, of a graph that outlives the pass.
        watched: outputs in whose place the model got another tensor on the same memory, for the sake of a tap.
        anchor: leaf on which taps depend that would otherwise not be part of the graph.
        replaced: tensors that stand in the place of parameters during the pass.
        buffers: what a repeat of checkpointed blocks writes to copies of.
        outlives: whether the graph is backpropagated after the pass, so that checkpoints must bring the pass along.
        float16: whether anything at the hooks ran in float16.
        prefix: the part of its graph that waits for pass 2, if there is one.
        scale: what the loss, and so g, was multiplied by in the backward of this pass.
    """

    tokens: TokenMasks
    observe: bool = False
    apply: bool = False
    capture: str | None = "detached"
    stop_after: int | None = None
    recording: bool = True
    gate: Gate = field(default_factory=Gate)
    states: list[State] = field(default_factory=list)
    fired: Counter[str] = field(default_factory=Counter)
    compiled: bool = False
    taps: list[GradientEdge] = field(default_factory=list)
    watched: list[WriteWatch] = field(default_factory=list)
    anchor: Tensor = field(default_factory=lambda: torch.zeros((), requires_grad=True))
    replaced: Sequence[Replacement] = ()
    buffers: list[tuple[nn.Module, str]] = field(default_factory=list)
    outlives: bool = False
    float16: bool = False
    prefix: SharedPrefix | None = None
    scale: float = 1.0

    @property
    def batch_size(self) -> int:
        """Length of the captured states along their first dimension."""
        return self.states[0].hidden.shape[0]

    def with_components(self, tokens: TokenMasks, replaced: Sequence[Replacement]) -> Pass:
        """The pass that repeats this one with the auxiliary components in place, and is backpropagated.

        Args:
            tokens: masks of the samples that it runs on.
            replaced: components that stand in the place of parameters.
        """
        return Pass(
            tokens, apply=True, capture="attached", replaced=replaced, buffers=self.buffers, outlives=self.outlives
        )

    def on_trial(self) -> Pass:
        """The same pass without a backward: what it captures is compared, and thrown away."""
        return Pass(self.tokens, apply=self.apply, capture="attached", replaced=self.replaced, buffers=self.buffers)

    def is_empty(self) -> bool:
        """Whether no token of any captured state counts."""
        return all(state.tokens.is_empty() for state in self.states)
