"""The loss function is called again, with the components in place, and checked to repeat what pass 1 did."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lfu_reg.auxiliaries import Auxiliary
from lfu_reg.diagnostics import UNREPEATABLE, WRITTEN_FIRST, Diagnostics
from lfu_reg.distributed.ddp import not_synchronising
from lfu_reg.hooks.entries import differing
from lfu_reg.hooks.forward_pass import ForwardPass, State
from lfu_reg.model.graph import grad_set_aside
from lfu_reg.model.module_state import Changes
from lfu_reg.model.patching import Patch, cached_weights_kept
from lfu_reg.model.rng import random_state_kept
from lfu_reg.step import checks
from lfu_reg.step.attached_model import AttachedModel
from lfu_reg.step.consistency import displacement
from lfu_reg.step.one_backward import OneBackward, nothing_saved
from lfu_reg.step.progress import Progress
from lfu_reg.step.settings import Settings
from lfu_reg.step.sft_loss import PlainSFT, SFTLoss
from lfu_reg.step.shared_backward import SharedBackward
from lfu_reg.step.strategy_choice import choose_strategy
from lfu_reg.step.strength import CLOSE, StepStrength

# How often pass 2 is tried for the sake of alpha at the first step.
TRIES = 6


class SecondPass:
    """What comes after pass 1 in a step; `Passes` adds what comes before."""

    clean: ForwardPass
    _changes: Changes | None = None
    _shared: SharedBackward | None = None
    _start: Tensor | None = None  # what pass 2 starts from where nothing below is differentiated with it
    _failure: str | None = None  # why pass 2 cannot begin where pass 1 did
    _repeats_whole = False  # whether a region runs again to its end, and so needs all of its graph where it came to it
    _total: Tensor | None = None
    _tries = False  # whether pass 2 is run for alpha alone, or to see whether it repeats, without a backward
    _is_unperturbed = False  # whether nothing but what does not repeat can move hidden states in pass 2

    def __init__(
        self,
        attached: AttachedModel,
        auxiliary: Auxiliary,
        sft: SFTLoss,
        trained: Sequence[Tensor],
        settings: Settings,
        strength: StepStrength,
        progress: Progress,
        diagnostics: Diagnostics,
    ) -> None:
        self._attached, self._auxiliary, self._sft, self._settings = attached, auxiliary, sft, settings
        self._strength, self._progress, self._diagnostics = strength, progress, diagnostics
        self.batch, self.engine, self._trained = sft.batch, strength.engine, trained
        self._strategy = choose_strategy(settings, self.engine, auxiliary, progress.scales, trained)

    def total(self) -> Tensor:
        """l_SFT + lam * l_cons, differentiable: put together once, as ranks do that side by side."""
        assert self._changes is not None
        if self._total is None:
            with self._attached.hooks.run(self.clean), self._changes.on_copies():
                self._total = self._strategy.total(self._strength)
        return self._total

    def gradient_here(self, batch: Any) -> float:
        """Let the auxiliary collect g where it is now, from a pass that gives nothing else; returns its factor."""
        auxiliary, hooks = self._auxiliary, self._attached.hooks
        checks.check_batch(batch)
        auxiliary.require_gradients(True)
        with self._again(), auxiliary.moved(keeps_graph=False):
            fwd = ForwardPass(self._sft.tokens_of(batch), capture=None, apply=True)
            with hooks.run(fwd):
                with hooks.recording():
                    loss = self._sft.again(batch)
                scale = self._strategy.backward_explicit(loss, fwd)
        auxiliary.require_gradients(False)
        return scale

    def find_alpha(self, samples: Tensor | None) -> float:
        """The alpha that reaches the displacement, tried out by passes without a backward; theta_aux moves with it."""
        # Ranks whose forward passes communicate take the first guess, and come nearer from step to step.
        alpha, h, self._tries = self._strength.alpha, self.clean.record.states, True
        for _ in range(0 if self.engine.in_lockstep else TRIES):
            with self.second(samples) as h_prime:
                moved, length = displacement(h, h_prime, samples)
            factor = self._strength.factor(float(moved / length))
            if (moved == 0 and self._strength.searches) or 1 / CLOSE < factor < CLOSE:
                break
            if not self._auxiliary.rescale(factor):
                break
            alpha *= factor
        self._tries = False
        return alpha

    def samples(self) -> Tensor | None:
        """Which samples pass 2 runs on, None for all. Where it is tried anyway, it is tried unperturbed as well."""
        samples = self._progress.samples(self.clean.record.batch_size, self._settings.batch_fraction)
        tries = samples is not None or self._strength.searches
        if tries and not self._attached.repeats and not self.engine.in_lockstep:
            self._tries = self._is_unperturbed = True
            with self.second(samples):
                self._attached.repeats = True
            self._tries = self._is_unperturbed = False
        return samples

    def sensible_alpha(self, samples: Tensor | None) -> float:
        """The same once the step is done, which leaves theta_aux where the step had it; NaN where that cannot be."""
        strength = self._strength
        if self.engine.in_lockstep:
            return strength.alpha * strength.factor(float(strength.figures["relative_distance"]))
        try:
            alpha = self.find_alpha(samples)
        except PlainSFT:
            return math.nan
        self._auxiliary.rescale(strength.alpha / alpha)
        return alpha

    @contextmanager
    def second(self, samples: Tensor | None) -> Iterator[list[State]]:
        """Pass 2 with the components in place: gives the perturbed states; the block is for its backward."""
        attached, in_lockstep = self._attached, self.engine.in_lockstep
        if self._failure is not None and not in_lockstep:
            self._progress.unrepeatable_steps += 1
            self._diagnostics.warn_once("for the first time", WRITTEN_FIRST.format(self._failure))
            raise PlainSFT(self.total())
        if samples is not None and self._sft.has_drawn():  # a smaller batch draws others: dropout would be compared
            raise ValueError(checks.CANNOT_DIVIDE.format(number=len(samples)))
        start = self._start if self._shared is None else self._shared.start
        answers = [] if start is None else attached.reused.answers(start, samples)
        with ExitStack() as stack:
            thrifty = attached.may_be_thrifty and not self.engine.is_sharded
            try:
                perturbed = self._run_second(stack, samples, answers, thrifty)
            except Exception:
                if not answers and not thrifty:
                    raise
                # Code around the blocks may need what only their running leaves behind, and code after them may take
                # gradients of its own: from now on all of it runs as in pass 1, with a graph.
                attached.reused.refuse()
                attached.may_be_thrifty = False
                perturbed = self._run_second(stack, samples, [], False)
            repeated = self._check_second(perturbed, samples)
            if repeated:
                yield self._states_of(perturbed, samples)
            elif in_lockstep:  # other ranks go through its backward
                self._strategy.backward_perturbed(_zero_of(perturbed), self._strength)
        if not repeated:
            raise PlainSFT(self.total())

    @contextmanager
    def _again(self, *, but_blocks: bool = False) -> Iterator[None]:
        """The model as pass 1 found it, and as pass 1 left it afterwards."""
        assert self._changes is not None
        attached = self._attached
        inside = attached.reused.inside if but_blocks else ()
        with (
            random_state_kept(attached.devices()),
            cached_weights_kept(),
            self._changes.from_the_start(inside),
            not_synchronising(self._sft.model, attached.model),
            grad_set_aside([*self._trained, *attached.state.trained]),  # a `backward()` in the loss counts once
        ):
            yield

    def _run_second(self, stack: ExitStack, samples: Tensor | None, answers: list[Patch], thrifty: bool) -> ForwardPass:
        attached, record, settings = self._attached, self.clean.record, self._settings
        with ExitStack() as inner:
            inner.enter_context(self._again(but_blocks=bool(answers)))
            # Inside, as weights have to move from where pass 1 began.
            inner.enter_context(self._auxiliary.moved(keeps_graph=self._strategy.keeps_graph))
            perturbed = ForwardPass(
                self._sft.tokens.select(samples),
                apply=True,
                capture="attached",
                patches=answers,
                leave=settings.leave_early if not self.engine.is_sharded else False,
                leave_after=len(record.states),
                quiet_tail=thrifty and not self._repeats_whole,
            )
            inner.enter_context(attached.hooks.run(perturbed))
            wanted = settings.is_one_backward or (self._tries and self.clean.record.goes_once)
            without_graph = wanted and (thrifty or self.engine.is_sharded)
            with attached.hooks.recording(), nothing_saved() if without_graph else nullcontext():
                self._sft.repeat(samples, record.batch_size)
            stack.push(inner.pop_all())
        return perturbed

    def _states_of(self, perturbed: ForwardPass, samples: Tensor | None) -> list[State]:
        """The perturbed states; as leaves beside the clean ones where these carry the gradient."""
        if not isinstance(self._strategy, OneBackward):
            return perturbed.record.states
        states = [replace(state, hidden=state.hidden.detach().requires_grad_()) for state in perturbed.record.states]
        pairs = zip(self.clean.record.states, states, strict=True)
        self._strategy.states = [(before.of(samples), after.hidden) for before, after in pairs]
        return states

    def _check_second(self, perturbed: ForwardPass, samples: Tensor | None) -> bool:
        """Whether pass 2 repeated pass 1; warns if not."""
        clean, eps = self.clean.record, self._strength.eps
        reached = self._auxiliary.moves_weights
        failure = self._failure or differing(clean.entries, perturbed.record.entries, samples, moved=reached)
        if failure is None and self._is_unperturbed:
            checks.check_same_layers([s.name for s in clean.states], [s.name for s in perturbed.record.states])
            moved, length = displacement(clean.states, perturbed.record.states, samples)
            # Kernels need not repeat to the last bit, and those for fewer rows round otherwise.
            if moved > (max(1e-5, 4 * eps) if samples is None else max(1e-3, 16 * eps)) * length:
                failure = "hidden states differ where nothing is perturbed"
        if samples is not None and (failure is not None or perturbed.record.batch_size != len(samples)):
            raise ValueError(checks.CANNOT_DIVIDE.format(number=len(samples)))
        if failure is None:
            checks.check_same_layers([s.name for s in clean.states], [s.name for s in perturbed.record.states])
            if samples is None:
                self._attached.coverage.compare(self.clean, perturbed)
        else:
            self._diagnostics.warn_once("not repeatable", UNREPEATABLE.format(failure))
        if self._failure is None and not self.engine.in_lockstep:
            self._progress.did_repeat(failure is None)
        return failure is None


def _zero_of(fwd: ForwardPass) -> Tensor:
    """Zero, with the graph of a pass."""
    return torch.stack([torch.nan_to_num(state.hidden.sum() * 0).float().cpu() for state in fwd.record.states]).sum()
