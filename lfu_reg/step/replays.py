"""Which recorded call pass 2 replays, checked against pass 1.

A replay that differs from pass 1 although nothing is perturbed would measure that difference instead of the
perturbation: surroundings that the trunk's inputs do not show (a context entered by the loss function), randomness
from elsewhere. So at regularized steps 1, 10, 100, ..., and whenever another call is to be replayed, an unperturbed
replay is compared with pass 1; what fails is not used again, and the next larger module is tried, at last the loss
function itself. Where forward passes communicate, ranks decide together: each has to run the same number of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from lfu_reg.diagnostics import Diagnostics
from lfu_reg.distributed.collectives import all_agree
from lfu_reg.distributed.engine import Engine
from lfu_reg.hooks.early_exit import early_exit_is_safe, hooks_stay_paired, way_out
from lfu_reg.hooks.forward_pass import Pass, State
from lfu_reg.hooks.model_hooks import ModelHooks
from lfu_reg.model.graph import leaves_of, nothing_saved
from lfu_reg.step.chain import Chain
from lfu_reg.step.sft_loss import SFTLoss
from lfu_reg.step.shared_backward import SharedPrefix
from lfu_reg.step.trunk import Trunk, replay

LOSS_FUNCTION = "the loss function"
CHAIN = "the layers from the first perturbed one on"


class Replays:
    """Repeats pass 1's forward.

    Args:
        hooks: of the regularizer.
        trunk: recorded calls.
        chain: a shorter way.
        diagnostics: told when nothing repeats pass 1.
    """

    def __init__(self, hooks: ModelHooks, trunk: Trunk, chain: Chain, diagnostics: Diagnostics) -> None:
        self._hooks = hooks
        self._trunk = trunk
        self._chain = chain
        self._diagnostics = diagnostics
        self._wrong: set[str] = set()
        self._checked, self._chain_checked = "", set[int]()
        self._digits = 0  # of the number of the last step
        self._model_id, self._may_exit_early = 0, False
        self._ways_out: dict[tuple[nn.Module, nn.Module], list[nn.Module]] = {}  # by where a forward begins and ends
        self._run: Callable[[], None] = _nothing
        self._stop_after: int | None = None

    def forget(self) -> None:
        """Let go of the call that was chosen, with its inputs."""
        self._run = _nothing

    def remove(self) -> None:
        """Let go of the model."""
        self.forget()
        self._ways_out = {}

    def prepare(
        self,
        turn: int,
        sft: SFTLoss,
        clean: Pass,
        perturbed: Pass,
        samples: Tensor | None,
        engine: Engine,
    ) -> None:
        """Choose what to replay for this step; puts right clean states that the model has written over.

        Args:
            turn: number of the step among those that `every` leaves.
            sft: the loss function of the step.
            clean: pass 1.
            perturbed: pass 2, before it runs.
            samples: the samples of the batch to replay, None for all.
            engine: how the model is spread over processes.

        Raises:
            ValueError: if the batch cannot be divided into samples.
        """
        overwritten = {state.name for state in clean.states if state.hidden._version != state.version}
        self._hooks.overwritten |= overwritten
        last = self._hooks.captured[clean.states[-1].name]
        candidates: list[tuple[str, Callable[[], None], nn.Module | None]] = [
            (
                name or "the model",
                partial(replay, calls, samples, clean.batch_size),
                None if any(call.enters_a_context for call in calls) else calls[0].module,
            )
            for name, calls in self._trunk.replays(sft.model)
            if engine.can_start_at(calls[0].module)
        ]
        loss_function = partial(sft.repeat, samples, clean.batch_size)
        candidates.append((LOSS_FUNCTION, loss_function, None))  # the user's code runs to its end
        candidates = [c for c in candidates if c[0] not in self._wrong]
        # The first one with more digits: at 10 or 100 itself lam may be 0. Ranks agree, as it follows from the step.
        due, self._digits = len(str(turn + 1)) != self._digits, len(str(turn + 1))
        if due or self._model_id != id(sft.model):
            self._model_id, self._may_exit_early = id(sft.model), early_exit_is_safe(sft.model)
            self._ways_out = {}
        for name, run, start in candidates:
            may_be_left = start is not None and self._may_be_left(start, last)
            self._stop_after = len(clean.states) if may_be_left else None
            self._run = run
            if not (due or overwritten or name != self._checked):
                self._shorten(clean, perturbed, samples, check=False)
                return
            with nothing_saved(), self.running(Pass(perturbed.tokens)) as plain:
                pass
            repeats = _repeats(plain.states, clean.states, samples, overwritten)
            device = clean.states[0].hidden.device
            if all_agree(repeats, engine.groups if engine.in_lockstep else (), device):
                self._checked = name
                if overwritten:
                    clean.states[:] = plain.states
                else:
                    self._shorten(clean, perturbed, samples, check=True)
                return
            self._wrong.add(name)
        self._wrong.discard(LOSS_FUNCTION)
        if samples is not None:
            raise ValueError(
                "batch_fraction < 1 needs inputs whose tensors have the samples along their first dimension: a replay "
                f"of {len(samples)} samples did not give their hidden states. Use batch_fraction=1.0, or every=k for a "
                "lower cost."
            )
        # There is nothing beyond it: it is used all the same, and looked at again only when that is due.
        self._checked = LOSS_FUNCTION
        self._diagnostics.tell(
            "not repeatable",
            "The model's forward cannot be repeated: run again without any perturbation it gives other hidden "
            "states, so l_cons measures that difference as well. Usual causes: random draws outside of torch's, "
            "numpy's and Python's global generators, or state that every forward changes.",
        )

    @property
    def can_shorten(self) -> bool:
        """Whether the chain has not been found wrong."""
        return CHAIN not in self._wrong

    def _shorten(self, clean: Pass, perturbed: Pass, samples: Tensor | None, *, check: bool) -> None:
        """Take the chain instead of the chosen replay, where it has the same hidden states, perturbed as well."""
        if clean.prefix is None or not self.can_shorten:
            return
        # Of a part of the samples a tensor may look like one entry per sample, at some size of the batch.
        about = 0 if samples is None else clean.batch_size
        check = check or about not in self._chain_checked
        long = None
        if check:
            with nothing_saved(), self.running(perturbed.on_trial()) as long:
                pass
        before = self._run, self._stop_after
        self._run = partial(self._chain.run, self._hooks, clean.prefix.start, samples, clean.batch_size)
        self._stop_after = None
        if long is not None and not self._is_right(perturbed.on_trial(), long, clean.prefix):
            self._wrong.add(CHAIN)
            self._run, self._stop_after = before
        self._chain_checked.add(about)

    def _is_right(self, trial: Pass, long: Pass, prefix: SharedPrefix) -> bool:
        try:
            with nothing_saved(), self.running(trial):
                pass
        except Exception:  # a layer of anybody's may need what a call of its own does not give it
            return False
        # Something of pass 1 that a layer has kept for others would be reached past the cut.
        reached = {id(leaf) for state in trial.states if state.hidden.requires_grad for leaf in leaves_of(state.hidden)}
        around = any(id(leaf) in reached for leaf in prefix.below)
        return not around and _repeats(trial.states, long.states, None, set(), ulps=4)

    def _may_be_left(self, start: nn.Module, last: nn.Module) -> bool:
        if not self._may_exit_early:
            return False
        if (start, last) not in self._ways_out:
            self._ways_out[start, last] = way_out(start, last)  # walks over all modules, so not at every step
        return hooks_stay_paired(self._ways_out[start, last])

    @contextmanager
    def running(self, this: Pass) -> Iterator[Pass]:
        """Run the chosen replay under `this`; the block is for its backward, while hooks still repeat the pass."""
        this.stop_after = self._stop_after
        with self._hooks.run(this):
            self._run()
            this.recording = False
            yield this


def _nothing() -> None:
    """What there is to replay outside of a step."""


def _repeats(
    again: list[State], clean: list[State], samples: Tensor | None, overwritten: set[str], ulps: float | None = None
) -> bool:
    if [state.name for state in again] != [state.name for state in clean]:
        return False
    for one, other in zip(again, clean, strict=True):
        if other.name in overwritten:
            continue
        if samples is not None and other.hidden.shape[0] <= int(samples.max()):
            return False
        before, after = other.of(samples).detach(), one.hidden.detach()
        if before.shape != after.shape:
            return False
        # Kernels on a GPU need not repeat to the last bit; another dropout mask is off by much more than this.
        eps = torch.finfo(before.dtype).eps
        tolerance = eps**0.5 if ulps is None else ulps * eps
        if not (after - before).float().norm() <= tolerance * before.float().norm():
            return False
    return True
