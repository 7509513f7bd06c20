"""The paper's failure signatures, each as one warning, with the cure: no effect, collapse, oscillation.

Values stay on their device until they are looked at, every `LOOK_EVERY` steps (and at the first), and how strong the
regularizer is where that was measured, so that other steps need no device synchronisation.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import correlation, fmean, pstdev

import torch
from torch import Tensor

LOOK_EVERY = 50

# Outside of these, in lengths of the SFT loss's gradient, that of the consistency term is nothing or everything.
NEGLIGIBLE, OVERWHELMING = 1e-3, 30.0
# The perturbed states are as far from the clean ones as from zero: nothing of the model is left in them.
COLLAPSED = 1.0
# Two terms that swing by a third of their mean, each up when the other is down, are pulling against each other.
SWING, OPPOSED = 0.33, -0.8

NO_GRADIENT = (
    "The consistency term has no gradient: no trainable parameter lies before the chosen layers, so it changes the "
    "loss's value and trains nothing. Choose later layers, or train earlier ones."
)
UNREPEATABLE = (
    "This step is plain SFT: sft_loss_fn was called a second time, with the model perturbed, and {}. Both calls have "
    "to see the same data and the same random draws. Take batches from iterators, count, write to the batch's tensors, "
    "and draw from generators of your own outside of sft_loss_fn, or keep what you draw in the batch; torch's, numpy's "
    "and Python's global generators and what the model's modules hold are put back for you. reg.is_second_pass tells "
    "your code which call it is in."
)
WRITTEN_FIRST = (
    "This step is plain SFT: {}, and what was there before is lost. It is copied from the next step on, so nothing "
    "needs to be done."
)
UNSCALED_FLOAT16 = (
    "float16 with sharded parameters: gradients are taken inside of the step, before a GradScaler multiplies the loss, "
    "and here the step cannot scale it itself, so small gradients are lost. Use bfloat16, or DistributedDataParallel."
)
EVAL_MODE = (
    "LfURegularizer was called on a model in eval mode with gradients enabled: it returns the plain SFT loss there. "
    "Call model.train() to have the regularizer applied."
)


NO_EFFECT = (
    "LfU has no effect: the gradient of lam * l_cons is {ratio:.1e} of that of the SFT loss. Use {cure} instead of "
    "{given} (useful are .3 to 3 times the SFT loss's gradient)."
)
TOO_MUCH = (
    "LfU outweighs the SFT loss: the gradient of lam * l_cons is {ratio:.0f} times as long. Use {cure} instead of "
    "{given} (useful are .3 to 3 times the SFT loss's gradient)."
)
ROUNDING_NOISE = (
    "LfU measures rounding: the hidden states move by {distance:.1e} of their length, and what they are computed in "
    "rounds by {eps:.1e}. Try alpha={alpha:.2g} instead of alpha={given:.2g}, or give strength and leave alpha out, "
    "which sets it so."
)
COLLAPSE = (
    "LfU collapses the model: the perturbed hidden states are {distance:.2f} times their own length away from the "
    "clean ones. alpha={given:.3g} is too large for this model: try alpha={alpha:.2g}, or give strength and leave "
    "alpha out."
)


@dataclass(frozen=True)
class Look:
    """What a step shows of how strong it is."""

    figures: Mapping[str, Tensor]  # where they were measured at this very step
    alpha: float
    lam: float | Tensor
    strength: float | None  # what lam follows from, None where it is fixed
    eps: float  # relative rounding of the hidden states
    tokens_count: bool  # whether any does
    sensible_alpha: Callable[[], float]  # finds one by passes of its own


class LfUWarning(UserWarning):
    """The regularizer has no effect, or not the one that is wanted."""


class Diagnostics:
    """Watches the terms of the loss of one regularizer; `told` are the kinds of its warnings so far."""

    def __init__(self) -> None:
        self.told: set[str] = set()
        self._window: list[tuple[Tensor, Tensor, Tensor]] = []
        self._period: int | None = None  # in which a step was watched last

    def warn_once(self, kind: str, message: str) -> None:
        """Warn, once per kind."""
        if kind not in self.told:
            self.told.add(kind)
            warnings.warn(message, LfUWarning, stacklevel=_levels_to_the_user())

    def is_due(self, turn: int) -> bool:
        """Whether values are looked at: at the first step watched in a period; `turn` counts the steps with LfU."""
        # The step's number decides, so resumed runs look where uninterrupted ones do (and at their first step).
        # Not `(turn + 1) % LOOK_EVERY == 0`: the regularizer may be off (lam = 0) at that very step.
        return self._period != (turn + 1) // LOOK_EVERY

    def watch(self, turn: int, sft_loss: Tensor, l_cons: Tensor, gradient_norm: Tensor, look: Look) -> None:
        """Take note of one step, and look at the last ones when it is due."""
        self._window.append((sft_loss, look.lam * l_cons, gradient_norm))
        if look.figures and look.tokens_count and look.alpha:
            self._how_strong(look, gradient_norm)
        if not self.is_due(turn):
            return
        self._period = (turn + 1) // LOOK_EVERY
        sft, consistency, norms = ([float(value) for value in column] for column in zip(*self._window, strict=True))
        self._window = []
        rounding = torch.finfo(torch.promote_types(sft_loss.dtype, torch.float32)).eps
        self._no_effect(sft, consistency, norms, look.alpha, rounding, complete=len(sft) >= LOOK_EVERY - 1)
        self._oscillation(sft, consistency)

    def _how_strong(self, look: Look, gradient_norm: Tensor) -> None:
        distance = float(look.figures.get("relative_distance", math.nan))
        if distance > COLLAPSED:
            if "collapse" not in self.told:
                alpha = look.sensible_alpha()
                self.warn_once("collapse", COLLAPSE.format(distance=distance, given=look.alpha, alpha=alpha))
            return
        if distance < look.eps:
            if "rounding noise" not in self.told and float(gradient_norm):
                alpha, given = look.sensible_alpha(), look.alpha
                message = ROUNDING_NOISE.format(distance=distance, eps=look.eps, alpha=alpha, given=given)
                self.warn_once("rounding noise", message)
            return
        ratio = float(look.figures.get("gradient_ratio", math.nan))
        lam = float(look.lam)
        cure, setting = "strength=1", f"strength={look.strength}"
        if look.strength is None:
            cure, setting = f"strength=1, or lam={lam / ratio if ratio else math.inf:.2g}", f"lam={lam:.3g}"
        if 0 < ratio < NEGLIGIBLE:
            self.warn_once("negligible", NO_EFFECT.format(ratio=ratio, cure=cure, given=setting))
        elif ratio > OVERWHELMING:
            self.warn_once("overwhelming", TOO_MUCH.format(ratio=ratio, cure=cure, given=setting))

    def _no_effect(
        self,
        sft: list[float],
        consistency: list[float],
        norms: list[float],
        alpha: float,
        rounding: float,
        complete: bool,
    ) -> None:
        if all(norm == 0 for norm in norms):
            self.warn_once(
                "zero gradient",
                "LfU has no effect: the gradient of the SFT loss with respect to the auxiliary components is exactly "
                f"zero ({len(norms)} step(s)). No chosen layer influences the loss, or no token counts in it: check "
                "layers=..., the labels, and that the loss comes from the attached model.",
            )
        elif alpha > 0 and all(alpha * norm < rounding * abs(s) for norm, s in zip(norms, sft, strict=True)):
            self.warn_once(
                "rounding",
                "LfU has no direction: a step of length alpha along the gradient of the auxiliary components changes "
                f"the SFT loss by less than its rounding (||g|| = {max(norms):.1e}): the direction is rounding, too. "
                "Something after the layers takes out what the components add (batch normalisation takes out steering "
                'vectors): use auxiliary="lora" or "weights", or other layers; or raise alpha.',
            )
        elif not all(map(math.isfinite, norms)):
            self.warn_once(
                "no direction",
                "The ascent gradient was not finite in some steps; they ran without a perturbation. In float16 use a "
                "GradScaler, and check the loss for overflow.",
            )
        if complete and not any(consistency):
            self.warn_once(
                "no distance",
                f"LfU has no effect: for {len(consistency)} steps lam * l_cons was zero. Raise alpha (the "
                "perturbation), or give strength and leave alpha out; and check that tokens count (labels, masks).",
            )

    def _oscillation(self, sft: list[float], consistency: list[float]) -> None:
        if len(sft) < LOOK_EVERY - 1 or not all(map(math.isfinite, sft + consistency)):
            return
        means = fmean(sft), fmean(consistency)
        spreads = pstdev(sft), pstdev(consistency)
        if min(means) <= 0 or spreads[0] < SWING * means[0] or spreads[1] < SWING * means[1]:
            return
        if correlation(sft, consistency) < OPPOSED:
            self.warn_once(
                "oscillation",
                "The SFT loss and lam * l_cons swing against each other: each step towards one undoes the other. "
                "Lower lam, or the learning rate.",
            )


_OURS = ("lfu_reg.", "torch._dynamo.", "torch._compile.")  # the latter keep the step out of compiled regions


def _levels_to_the_user() -> int:
    """The `stacklevel` by which a warning of our caller names the first line outside of this package."""
    frame, level = sys._getframe(2), 2
    while frame.f_back is not None and f"{frame.f_globals.get('__name__', '')}.".startswith(_OURS):
        frame, level = frame.f_back, level + 1
    return level
