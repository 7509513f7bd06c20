"""All that outlives a step, but for what has been learnt of the model (`attached_model.py`).

`state_dict` holds what a resumed run needs to go on bit for bit. It leaves out counts of what went wrong, which are
figures for the user, how long to wait before a loss that did not repeat is tried again, and the direction of steps
with one backward, which are as many numbers as components: the first step of a resumed run brings it anew.

Which calls belong to one step: L-BFGS evaluates its closure at several points, and a line search needs the same
function at each. So LoRA's A and the samples that are drawn stay the same inside of one `optimizer.step(closure)`, and
where the batch and the weights are those of the call before.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lfu_reg.auxiliaries.base import Generators
from lfu_reg.model.names import shown
from lfu_reg.model.rng import StepDraws
from lfu_reg.model.tables import tensors_in
from lfu_reg.step.float16 import LossScales
from lfu_reg.step.one_backward import Direction
from lfu_reg.step.settings import Settings, check_number
from lfu_reg.step.sft_loss import is_repeating
from lfu_reg.step.strength import Strength

STEPS_TWICE = "An optimizer stepped in sft_loss_fn's second call: step outside, or where reg.is_second_pass is False."
STATE = "The state {} cannot be loaded ({}); it needs 'step' and 'seed', as LfURegularizer.state_dict() gives them."


class SameStep:
    """Tells calls that repeat one step from those that begin a new one."""

    def __init__(self) -> None:
        self._running, self._optimizer_steps = 0, 0
        self._last: tuple[int, list[weakref.ref[Tensor]], int] | None = None
        self._in_closure: int | None = None
        me = weakref.ref(self)  # torch's table of hooks is the process's
        self._handles = [
            register_optimizer_step_pre_hook(lambda *call: _count(me, 1)),
            register_optimizer_step_post_hook(lambda *call: _count(me, -1)),
        ]
        for handle in self._handles:
            weakref.finalize(self, handle.remove)

    def remove(self) -> None:
        """Stop counting optimizer steps."""
        for handle in self._handles:
            handle.remove()

    def is_in_closure(self) -> bool:
        """Whether this call comes from a closure that has called before in the same `optimizer.step`."""
        current = self._optimizer_steps if self._running > 0 else None
        again = current is not None and current == self._in_closure
        self._in_closure = current
        return again

    def repeats(self, trained: Sequence[Tensor], batch: Any) -> bool:
        """Whether the batch's tensors and the trained weights are those of the call before."""
        tensors = list(islice(tensors_in(batch), 8))
        version = sum(weight._version for weight in trained if not weight.is_inference())  # counters, which only grow
        of = id(trained[0]) if trained else 0
        last, self._last = self._last, (version, [weakref.ref(tensor) for tensor in tensors], of)
        if last is None or not tensors or last[0] != version or last[2] != of or len(last[1]) != len(tensors):
            return False
        return all(ref() is tensor for ref, tensor in zip(last[1], tensors, strict=True))


def _count(me: weakref.ref[SameStep], change: int) -> None:
    this = me()
    if change > 0 and is_repeating():
        raise RuntimeError(STEPS_TWICE)
    if this is not None:
        this._running = max(this._running + change, 0)
        this._optimizer_steps += change > 0


# Steps after which a loss that never repeats is tried again, at most.
LONGEST_WAIT = 64


class Progress:
    """Where a regularizer is."""

    def __init__(self, seed: int | None, settings: Settings) -> None:
        self.strength, self.direction = Strength(settings), Direction()
        self.step, self.seed = 0, torch.initial_seed() % 2**31 if seed is None else int(seed)
        self.scales = LossScales()
        self.empty_steps = 0  # how many had no token that counts
        self.unrepeatable_steps = 0  # how many were plain SFT, as the loss did not repeat
        self.same_step = SameStep()
        self._drawn_at, self._wait, self._resume_at = 0, 0, 0

    def begin(self, trained: Sequence[Tensor], batch: Any) -> int:
        """Start a step, or go on with the last one where an optimizer's closure is evaluated again."""
        again = self.same_step.is_in_closure() and self.step > 0
        number = self.step - again
        if not (self.same_step.repeats(trained, batch) or again):
            self._drawn_at = number
        return number

    def samples(self, batch_size: int, fraction: float) -> Tensor | None:
        """Numbers of the samples that pass 2 runs on, None for all."""
        return StepDraws(self.seed, self._drawn_at).samples(batch_size, fraction)

    def generators(self) -> Generators:
        """Those of the components: new ones at each step, unless their direction comes from the steps before."""
        return StepDraws(self.seed, 0 if self.strength.settings.is_one_backward else self._drawn_at).generator

    def waits(self) -> bool:
        """Whether the loss did not repeat lately, so that it is not called twice at this step."""
        return self.step < self._resume_at

    def did_repeat(self, repeated: bool) -> None:
        """Note whether pass 2 repeated pass 1 at this step."""
        self._wait = 0 if repeated else min(2 * self._wait + 1, LONGEST_WAIT)
        self._resume_at = 0 if repeated else self.step + 1 + self._wait
        self.unrepeatable_steps += not repeated

    def state_dict(self) -> dict[str, Any]:
        """Step count, seed of all draws, scales of float16, and what alpha and lam follow from."""
        parts = {"loss_scales": self.scales.state_dict(), "strength": self.strength.state_dict()}
        return {"step": self.step, "seed": self.seed, **parts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`."""
        try:
            step, seed = int(check_number("step", float(state["step"]))), int(state["seed"])
            scales, strength = LossScales(), Strength(self.strength.settings)
            scales.load_state_dict(state.get("loss_scales", {}))
            strength.load_state_dict(state.get("strength", {}))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(STATE.format(shown(state), error)) from error
        self.step, self.seed, self.scales, self.strength = step, seed, scales, strength
        self._drawn_at, self._wait, self._resume_at = self.step, 0, 0
