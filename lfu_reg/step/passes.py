"""One regularized step: its two passes through the model, and what the second one takes from the first.

The second pass is in a file of its own, `second_pass.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal
from weakref import ref

from torch import Tensor

from lfu_reg.auxiliaries.base import Generators
from lfu_reg.diagnostics import NO_GRADIENT, UNSCALED_FLOAT16
from lfu_reg.hooks.forward_pass import ForwardPass, State
from lfu_reg.model import checkpoints
from lfu_reg.model.compile import anything_is_compiled, graphs_for_two_backwards
from lfu_reg.model.graph import Graph, graph_of, now
from lfu_reg.model.module_state import Changes
from lfu_reg.model.moving import memory_of
from lfu_reg.model.patching import cached_weights_kept
from lfu_reg.model.tables import held_by, tensors_in
from lfu_reg.step.consistency import rounding
from lfu_reg.step.float16 import float16_in_play
from lfu_reg.step.gradients import Retained
from lfu_reg.step.one_backward import ONE_STEP
from lfu_reg.step.second_pass import SecondPass
from lfu_reg.step.sft_loss import PlainSFT
from lfu_reg.step.shared_backward import shared_backward


class Passes(SecondPass):
    """The passes of one step."""

    scale: float = 1.0  # what g was multiplied by in the backward of pass 1

    @contextmanager
    def running(self, generators: Generators) -> Iterator[None]:
        """Hooks are on the model for the block, and theta_aux starts at "no change"."""
        auxiliary, hooks, reused = self._auxiliary, self._attached.hooks, self._attached.reused
        auxiliary.shards = self.engine.shards
        if self._settings.is_one_backward:
            self._progress.direction.collect(auxiliary)
        auxiliary.reset(generators)
        try:
            with hooks.installed(stay=anything_is_compiled(self._sft.model)):
                yield
        finally:
            reused.forget()

    def first(self, *, observe: bool) -> tuple[Tensor, list[State]]:
        """Pass 1, with its backward."""
        attached, sft, hooks = self._attached, self._sft, self._attached.hooks
        kept: Literal["detached", "attached", "cloned"] = "attached" if self._settings.is_one_backward else "detached"
        capture = kept if self._settings.stop_gradient == "clean" else "cloned"
        self.clean = clean = ForwardPass(sft.tokens, observe=observe, capture=capture)
        reuse = not self._strategy.keeps_graph and not self.engine.in_lockstep
        attached.compare_with_loss(self._turn, tensors_in(sft.batch) if self._settings.token_mask is None else ())
        attributes = not self.engine.is_sharded or self.engine.shards is not None
        attached.state.begin(sft.model, attributes=attributes, held=held_by(attached.model, sft.function, sft.batch))
        since = now()
        with (
            checkpoints.noted() as noted,
            graphs_for_two_backwards(self._strategy.keeps_graph),
            attached.wrappers.must_run(sft.model, attached.model, lambda: bool(clean.record.states)),
            attached.reused.recording(clean, reuse),
            cached_weights_kept(),
            hooks.run(clean),
            hooks.recording(),
        ):
            loss = sft.first(attached.devices(), check_value=self._progress.step == 0)
        checkpointed = "checkpoint" in noted
        clean.record.goes_once = clean.record.goes_once or "selective" in noted
        self._repeats_whole = checkpointed and not checkpoints.repeats_stop_early()
        self._changes = changes = attached.state.changes()
        # Loops return a dummy loss for an empty batch, zero times the sum of all parameters.
        if not clean.record.states and (attached.has_run or not bool(loss.detach())):
            raise PlainSFT(loss)
        if self._settings.is_one_backward:
            return self._first_of_one(loss, changes)
        graph = graph_of(loss, since)
        hooked = "hook" in noted or any(type(node).__name__ == "BackwardHookFunctionBackward" for node in graph.own)
        self._retain_where_due(graph, changes, hooked=hooked, checkpointed=checkpointed)
        leaves = self._share(loss, graph.leaves, changes, hooked=hooked)
        attached.check_clean(clean, leaves, sft.model, self._turn)
        self._strength.eps = rounding(clean.record.states)
        self._look_at_states(changes)
        if not self._strategy.scales_float16 and float16_in_play(clean, [loss, *leaves]):
            self._diagnostics.warn_once("float16 shards", UNSCALED_FLOAT16)
        with hooks.run(clean), changes.on_copies():
            self.scale = self._strategy.backward_clean(loss, leaves, clean, self._shared)
        return loss.detach(), clean.record.states

    def _retain_where_due(self, graph: Graph, changes: Changes, *, hooked: bool, checkpointed: bool) -> None:
        """Retain the graph where nothing else is exact; refuse what a retained graph cannot have."""
        outside = graph.reaches_outside and not self.clean.record.in_thread  # every thread counts its nodes
        # Hooks that change gradients need not be linear, and what they see has to be lam * l_cons with the lam found.
        apart = hooked and not self._strength.lam
        if not (self._strategy.keeps_graph or outside or apart):
            return
        refused = "Activation checkpointing" if checkpointed else None
        if any(weight.requires_grad for weight, _ in changes.weights):
            refused = "A forward that writes to trained weights"
        elif self._auxiliary.moves_weights and _reads_weights(graph.own, self._trained):
            refused = "A function that keeps modules or weights for its backward, with moved ones,"
        elif self._auxiliary.moves_weights and self.clean.record.in_thread:  # hooks on what is saved are a thread's own
            refused = "A model in a thread, with moved weights,"
        if not self._strategy.keeps_graph:
            if not outside and (refused or self.clean.record.goes_once or self.engine.is_sharded):
                return
            self._strategy = Retained(self._auxiliary, self._progress.scales, self._trained)
        if refused or self.clean.record.goes_once:
            raise RuntimeError(checkpoints.REFUSED.format(refused) if refused else checkpoints.OFFLOADED)

    def _first_of_one(self, loss: Tensor, changes: Changes) -> tuple[Tensor, list[State]]:
        """Nothing is differentiated yet; without a new direction the step is plain SFT, and brings one."""
        clean, attached = self.clean, self._attached
        # FSDP2's shards are on no graph, and what reentrant checkpoints hide is on none that could be walked.
        leaves = [*self._trained, clean.anchor] if self.engine.shards is None else graph_of(loss).leaves
        attached.check_clean(clean, leaves, self._sft.model, self._turn)
        self._strength.eps = rounding(clean.record.states)
        self._look_at_states(changes)
        self._strategy.backward_clean(loss, [], clean, None)
        if clean.gate.is_crossed and not self._auxiliary.moves_weights:
            raise ValueError(ONE_STEP.format(what="A loss with gradients of gradients, or with tangents,"))
        if not self._progress.direction.is_new:
            self._auxiliary.collect_later(loss)
            clean.gate.is_open = True
            raise PlainSFT(loss)
        cut = attached.reused.cut(changes, clean.record.states)
        self._start = None if cut is None else cut.detach()
        return loss.detach(), clean.record.states

    def backward(self, l_cons: Tensor) -> None:
        """Take d l_cons / d theta."""
        if not l_cons.requires_grad:
            self._diagnostics.warn_once("no gradient", NO_GRADIENT)
        self._strategy.backward_perturbed(l_cons, self._strength)

    def _share(self, loss: Tensor, leaves: list[Tensor], changes: Changes, *, hooked: bool) -> list[Tensor]:
        """Let both passes share what no perturbation reaches, where that is exact; gives all leaves."""
        attached, clean = self._attached, self.clean
        # A hook on a tensor below the cut would see the sum of both terms, and need not be linear. To compare gradients
        # the part below is gone through twice, which who keeps saved tensors for one backward does not expect.
        apart = hooked or (self._strength.compares and clean.record.goes_once)
        cut = None if self._strategy.keeps_graph or apart else attached.reused.cut(changes, clean.record.states)
        if cut is not None:
            shared = shared_backward(loss, cut, clean.anchor)
            # A scaled loss may have to be backpropagated again, which the part that waits would not follow.
            if shared is not None and not float16_in_play(clean, [loss, *leaves]):
                self._shared = shared
                return [*shared.above, *shared.below]
        attached.reused.forget()
        return leaves

    def _look_at_states(self, changes: Changes) -> None:
        """What the model has written to for the first time is lost for this step, and copied from the next one on."""
        hooks, states = self._attached.hooks, self.clean.record.states
        written = {state.name for state in states if state.is_written_over}
        if lost := [state.name for state in states if state.is_written_over and not state.is_copy]:
            self._failure = f"the model wrote over what {lost[0]} returned, for the first time"
        elif changes.late:
            self._failure = f"the forward wrote to {changes.late[0]}, for the first time"
        hooks.overwritten = (hooks.overwritten or set()) | written

    @property
    def _turn(self) -> int:
        return self._progress.step // self._settings.every


def _reads_weights(functions: list[Any], trained: Sequence[Tensor]) -> bool:
    """Whether functions with a backward of their own have kept what they may call there, or weights."""
    kept = [vars(function) for function in functions]
    called = (callable(value) and not isinstance(value, ref) for values in kept for value in values.values())
    return any(called) or not memory_of(trained).isdisjoint(memory_of(tensors_in(kept)))
