"""One ordinary backward: the direction is known beforehand, and pass 2 is a forward that nothing is kept of.

      loss = l_SFT + lam * l_cons,    d loss / d h_l = d l_SFT / d h_l + lam * d l_cons / d h'_l

The clean hidden states carry the gradient of l_cons with respect to the perturbed ones, so it reaches theta by the
clean pass's Jacobian instead of the perturbed one's: a bias of order alpha, which the displacement keeps small. The
direction comes from the backward of the call before, which is plain SFT: every second call acts. After l_SFT + lam *
l_cons it would bring the second term's gradient as well, and feed on itself while the SFT gradient turns. In return the
caller's backward is that of plain SFT, with its graph alone: reentrant checkpointing, FSDP1, ZeRO and
optimizers that step inside of the backward see nothing unusual.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from lfu_reg.auxiliaries import Auxiliary
from lfu_reg.auxiliaries.ascent import gradient_norm
from lfu_reg.hooks.forward_pass import ForwardPass
from lfu_reg.model.compile import allows_one_backward
from lfu_reg.model.graph import reenters
from lfu_reg.step.comparison import Comparison
from lfu_reg.step.gradients import Retained
from lfu_reg.step.shared_backward import SharedBackward
from lfu_reg.step.strength import StepStrength

NOTHING_KEPT = (
    "sft_loss_fn takes a gradient of its own in its second call, of which strategy='one-backward' keeps no graph. Use "
    "strategy='auto'."
)
ONE_STEP = (
    "strategy='one-backward' takes its direction from earlier backward passes. {what} asks for one of its own: use "
    "strategy='auto'."
)


class OneBackward(Retained):
    """Nothing is differentiated in the step, but for the comparison of gradients where it is due."""

    keeps_graph = False
    _carriers: Sequence[tuple[Tensor, Tensor]] = ()  # h_l, and the gradient of l_cons that it is to carry
    states: Sequence[tuple[Tensor, Tensor]] = ()  # h_l in pass 1's graph, and h'_l

    def backward_clean(
        self, sft_loss: Tensor, leaves: list[Tensor], clean: ForwardPass, shared: SharedBackward | None
    ) -> float:
        """None: that is the caller's."""
        self._sft_loss, self._once = sft_loss, clean.record.goes_once
        return 1.0

    def backward_perturbed(self, l_cons: Tensor, strength: StepStrength) -> None:
        """Take the gradient of l_cons with respect to the perturbed states, for the clean ones to carry."""
        h = [state for state, _ in self.states]
        h_prime = [leaf for _, leaf in self.states]
        found: Sequence[Tensor | None] = [None] * len(h)
        if l_cons.requires_grad:
            found = torch.autograd.grad(l_cons, h_prime, allow_unused=True)
        pairs = zip(h, found, strict=True)
        self._carriers = [(state, g) for state, g in pairs if g is not None and state.requires_grad]
        self._l_cons = l_cons.detach()

    def _term(self, lam: float | Tensor) -> Tensor:
        assert self._l_cons is not None
        return _carry((lam * self._l_cons).to(self._l_cons.dtype), lam, self._carriers)

    def _compare(self, term: Tensor) -> Comparison | None:
        if self._once or reenters(self._sft_loss):
            return None
        try:
            return super()._compare(term)
        except RuntimeError as error:
            if allows_one_backward(error):
                return None
            raise


def _carry(value: Tensor, lam: float | Tensor, carriers: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """`value`, whose gradient with respect to each state is lam times the tensor beside it."""
    result: Tensor = _Carried.apply(value, lam, [g for _, g in carriers], *(state for state, _ in carriers))  # type: ignore[no-untyped-call]
    return result


class _Carried(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, lam: float | Tensor, gradients: list[Tensor], *states: Tensor) -> Tensor:
        ctx.lam, ctx.gradients = lam, gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        factor = ctx.lam * grad_output
        return None, None, None, *(g * factor.to(g.device, g.dtype) for g in ctx.gradients)


def nothing_saved() -> AbstractContextManager[Any]:
    """Operations in the block take part in a graph as in any forward, and keep nothing for its backward."""
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, _unpack)


def _unpack(packed: None) -> Tensor:
    raise RuntimeError(NOTHING_KEPT)


# Weight of the past in the mean of directions of length one: with more, it lags behind; with less, it is one batch's.
MEMORY = 0.5


class Direction:
    """A mean over the last steps."""

    def __init__(self) -> None:
        self._mean: dict[str, Tensor] = {}
        self.is_new = False  # whether a backward has brought one that no step has used yet

    def collect(self, auxiliary: Auxiliary) -> None:
        """Take what was brought since the last step; the auxiliary forgets it."""
        found: dict[str, Tensor] = {}

        def take(gradients: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            found.update(gradients)
            return gradients

        auxiliary.replace_gradients(take)
        auxiliary.forget_gradient()
        if not found:
            return
        norm = gradient_norm(list(found.values()))
        if not (torch.isfinite(norm) and norm > 0):  # no backward, or one that overflowed
            return
        for name, gradient in found.items():
            unit, mean = gradient.detach() / norm, self._mean.get(name)
            known = mean is not None and mean.shape == unit.shape and mean.device == unit.device
            self._mean[name] = MEMORY * mean + (1 - MEMORY) * unit if known and mean is not None else unit
        self.is_new = True

    def hand_over(self, auxiliary: Auxiliary) -> None:
        """Let it be g, once; components that it does not know stay where they are."""
        self.is_new = False

        def known(gradients: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            return {
                name: mean if (mean := self._mean.get(name)) is not None and mean.shape == zero.shape else zero
                for name, zero in gradients.items()
            }

        auxiliary.replace_gradients(known)
