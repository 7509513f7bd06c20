"""Gradients that float16 would lose are taken of a scaled loss, as a GradScaler does it, but inside of the step.

The step takes its gradients before the caller's GradScaler multiplies the loss, so that scale comes too late for what
underflows on the way down. Where float16 is in play the loss is multiplied by a power of two first, and the returned
loss divides by it again in float32. The caller's scaler is neither read nor changed: it sees an ordinary loss.

The scale finds itself as GradScaler's does (Micikevicius et al. 2018, arXiv 1710.03740), except that a step that
overflows is not lost: its backward is repeated with half the scale, down to 1. What is not finite at 1 either is handed
over as it is, for the caller's scaler to skip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lfu_reg.hooks.forward_pass import ForwardPass
from lfu_reg.hooks.taps import Gate
from lfu_reg.model.graph import gradients_of

# GradScaler's: the first scale, and so many steps without an overflow until it is doubled.
FIRST_SCALE = 2.0**16
# A mean over tokens, layers and features has smaller ones, and nothing else multiplies l_cons before its backward.
FIRST_PERTURBED = 2.0**24
GROWTH_INTERVAL = 2000

Gradients = tuple["Tensor | None", ...]


class LossScale:
    """The scale of one kind of backward; remembered from step to step."""

    def __init__(self, value: float = FIRST_SCALE) -> None:
        self.first = self.value = value
        self.good_steps = 0

    def gradients(
        self,
        loss: Tensor,
        wanted: Sequence[Tensor | GradientEdge],
        *,
        float16: bool,
        keep_graph: bool = False,
        gate: Gate | None = None,
        forget: Callable[[], None] = lambda: None,
    ) -> tuple[Gradients, float]:
        """Gradients of `loss`, multiplied by a scale where `float16` says that they could underflow, and that scale."""
        # The taps of the gate's pass collect on the way, and what they collect has to be finite, too; `forget` drops it
        # before a backward is repeated, for which buffers live as long as `loss` does.
        if not float16:
            return gradients_of(loss, wanted, keep_graph=keep_graph), 1.0
        scale = min(self.value, 2.0**15) if loss.dtype is torch.float16 else self.value  # 2**16 does not fit into it
        while True:
            collected = Gate() if gate is None else gate
            collected.finite = []
            upstream = torch.full_like(loss, scale)
            gradients = gradients_of(loss, wanted, upstream, keep_graph=True)
            if all_finite(gradients, collected.finite):
                self._succeeded(scale)
                return gradients, scale
            # One without an end in sight (a loss of NaN) needs no further try.
            if scale <= 1 or not torch.isfinite(loss.detach()):
                self.value = max(self.value / 2, 1.0)
                return gradients, scale
            scale /= 2
            del gradients
            forget()

    def _succeeded(self, scale: float) -> None:
        self.good_steps = self.good_steps + 1 if scale == self.value else 0
        self.value = scale
        if self.good_steps == GROWTH_INTERVAL:
            self.value, self.good_steps = 2 * scale, 0


@dataclass
class LossScales:
    """One scale for each loss of a step: their gradients differ in size."""

    clean: LossScale = field(default_factory=LossScale)
    ascent: LossScale = field(default_factory=LossScale)  # of passes that are run for g alone
    perturbed: LossScale = field(default_factory=lambda: LossScale(FIRST_PERTURBED))

    def state_dict(self) -> dict[str, tuple[float, int]]:
        """Name to scale and number of good steps."""
        return {name: (scale.value, scale.good_steps) for name, scale in vars(self).items()}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        """Continue with these; what is missing starts anew."""
        for name, scale in vars(self).items():
            value, good_steps = state.get(name, (scale.first, 0))
            scale.value, scale.good_steps = float(value), int(good_steps)


def float16_in_play(fwd: ForwardPass, tensors: Iterable[Tensor]) -> bool:
    """Whether a pass computed in float16 somewhere, or one of the tensors (the loss, its leaves) is kept in it."""
    return fwd.record.float16 or any(tensor.dtype is torch.float16 for tensor in tensors)


def all_finite(gradients: Iterable[Tensor | None], flags: Sequence[Tensor] = ()) -> bool:
    """Whether all gradients are finite and all flags set, for one synchronisation of the device."""
    values = [g.coalesce().values() if g.is_sparse else g for g in gradients if g is not None]
    found = [*flags, *(torch.isfinite(value).all() for value in values)]
    return not found or bool(torch.stack([flag.to(found[0].device) for flag in found]).all())
