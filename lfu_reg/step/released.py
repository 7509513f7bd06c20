"""Both passes' gradients are taken at once, and the returned loss hands their sum over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from lfu_reg.auxiliaries import Auxiliary
from lfu_reg.distributed.fsdp2 import Shards
from lfu_reg.hooks.forward_pass import ForwardPass
from lfu_reg.model.graph import grad_set_aside, leaves_of
from lfu_reg.step.comparison import Comparison, compare
from lfu_reg.step.float16 import LossScale, LossScales, float16_in_play
from lfu_reg.step.gradients import Pair, Pairs, down_to_components, together
from lfu_reg.step.returned_loss import returned_loss
from lfu_reg.step.shared_backward import SharedBackward
from lfu_reg.step.strength import StepStrength


class Released:
    """Gradients are taken at once and handed over by the returned loss; nothing stays in the `.grad` of `trained`."""

    keeps_graph = False
    scales_float16 = True

    def __init__(self, auxiliary: Auxiliary, scales: LossScales, trained: Sequence[Tensor]) -> None:
        self._auxiliary, self._scales, self._trained = auxiliary, scales, trained
        self._value = torch.zeros((), device="cpu")
        self._shared: SharedBackward | None = None
        self._float16, self._scale = False, 1.0
        self._gradients: dict[int, tuple[Tensor, Tensor | None]] = {}

    def backward_clean(
        self, sft_loss: Tensor, leaves: list[Tensor], clean: ForwardPass, shared: SharedBackward | None
    ) -> float:
        """One backward for everything; the taps of `clean` collect g on its way."""
        self._value, self._shared = sft_loss.detach(), shared
        self._float16 = float16_in_play(clean, [sft_loss, *leaves])
        with clean.gate.opened():
            pairs, self._scale = self._differentiate(
                sft_loss, leaves if shared is None else shared.above, self._scales.clean, clean
            )
        self._add(pairs, self._scale)
        for own in (clean.anchor, *self._auxiliary.temporary_leaves()):
            self._gradients.pop(id(own), None)
        if clean.observe:
            self._auxiliary.gradient_from([leaf for leaf, _ in pairs], [gradient for _, gradient in pairs])
        return self._scale

    def backward_explicit(self, sft_loss: Tensor, fwd: ForwardPass) -> float:
        """A backward down to the components."""
        return down_to_components(sft_loss, fwd, self._auxiliary, self._scales.ascent, self._trained, float16=True)

    def backward_perturbed(self, l_cons: Tensor, strength: StepStrength) -> None:
        """A second backward, added lam times to the first."""
        pairs: Pairs = []
        scale = 1.0
        if l_cons.requires_grad:
            pairs, scale = self._differentiate(l_cons, leaves_of(l_cons), self._scales.perturbed)
        pairs, at_cut = self._without_start(pairs)
        whole = above = None
        if strength.compares:
            above = self._compare(self._gradients.values(), pairs, scale, with_product=strength.is_due)
            if self._shared is None:
                whole, above = above, None
            elif strength.is_due or above is None:
                first, second = self._both_below(at_cut)
                at_cut = None
                together = [*self._gradients.values(), *first], [*pairs, *second]
                whole = self._compare(*together, scale, with_product=True)
                self._add(first, 1.0)
                pairs = together[1]
        lam = strength.weigh(whole, above, self._value.device)
        self._add(pairs, scale, lam)
        if self._shared is not None and at_cut is not None:
            self._shared.collect(at_cut * _on(lam, at_cut))
        self._value = self._value + (lam * l_cons.detach()).to(self._value)

    def total(self) -> Tensor:
        """The loss that hands both terms' gradients over."""
        if self._shared is not None:
            self._add(self._below(self._shared.backward), 1.0)
        return returned_loss(self._value, self._gradients.values(), self._scale)

    def _without_start(self, pairs: Pairs) -> tuple[list[tuple[Tensor, Tensor | None]], Tensor | None]:
        """The pairs of pass 2 but for the leaf that it started from, and that one's gradient."""
        start = None if self._shared is None else self._shared.start
        return [pair for pair in pairs if pair[0] is not start], next((g for leaf, g in pairs if leaf is start), None)

    def _both_below(self, at_cut: Tensor | None) -> tuple[Pairs, Pairs]:
        """The shared part differentiated for each term alone: a sum of both tells nothing about either."""
        assert self._shared is not None
        first = self._below(self._shared.backward_of_first)
        self._shared.collect(at_cut)
        second, self._shared = self._below(self._shared.backward), None
        return first, second

    def _below(self, backward: Callable[[], Pairs]) -> Pairs:
        with grad_set_aside(self._trained) as written:
            pairs = backward()
        return [*pairs, *written]

    def _compare(self, first: Iterable[Pair], second: Iterable[Pair], scale: float, **kind: bool) -> Comparison | None:
        return compare(first, second, self._trained, scales=(self._scale, scale), **kind)

    def _differentiate(
        self, loss: Tensor, leaves: list[Tensor], scale: LossScale, clean: ForwardPass | None = None
    ) -> tuple[Pairs, float]:
        edge = [] if clean is None or self._shared is None or self._shared.edge is None else [self._shared.edge]
        gate = None if clean is None else clean.gate
        forget: Callable[[], None] = self._auxiliary.forget_gradient if clean is not None else _nothing
        with grad_set_aside([*self._trained, *leaves]) as written:
            gradients, used = scale.gradients(loss, [*leaves, *edge], float16=self._float16, gate=gate, forget=forget)
        if edge and self._shared is not None:
            self._shared.collect(gradients[-1])
        return together(list(zip(leaves, gradients, strict=False)), written), used

    def _add(self, pairs: Pairs, scale: float, lam: float | Tensor = 1.0) -> None:
        factor = lam if scale == self._scale else lam * (self._scale / scale)
        for leaf, gradient in pairs:
            if gradient is None:
                self._gradients.setdefault(id(leaf), (leaf, None))
                continue
            if isinstance(factor, Tensor) or factor != 1:
                gradient = _exact(gradient) * _on(factor, gradient)
            _, before = self._gradients.get(id(leaf), (leaf, None))
            together = gradient if before is None else _exact(before) + _exact(gradient)
            self._gradients[id(leaf)] = leaf, together


class ReleasedShards(Released):
    """The same under FSDP2, where nothing is scaled for float16: all ranks would have to repeat a backward."""

    scales_float16 = False

    def __init__(self, auxiliary: Auxiliary, scales: LossScales, shards: Shards) -> None:
        super().__init__(auxiliary, scales, ())
        self._shards = shards

    def backward_explicit(self, sft_loss: Tensor, fwd: ForwardPass) -> float:
        """A backward down to the components; a whole one where these are the shards."""
        auxiliary = self._auxiliary
        if not auxiliary.moves_weights:
            return down_to_components(sft_loss, fwd, auxiliary, self._scales.ascent, (), float16=False)
        pairs = self._shards.gradients_of(sft_loss, leaves_of(sft_loss))
        auxiliary.gradient_from([leaf for leaf, _ in pairs], [gradient for _, gradient in pairs])
        return 1.0

    def _differentiate(
        self, loss: Tensor, leaves: list[Tensor], scale: LossScale, clean: ForwardPass | None = None
    ) -> tuple[Pairs, float]:
        return self._shards.gradients_of(loss, leaves), 1.0


def _exact(gradient: Tensor) -> Tensor:
    # Scaled gradients fill the range of float16, and their sum would leave it.
    return gradient.float() if gradient.dtype is torch.float16 else gradient


def _on(factor: float | Tensor, gradient: Tensor) -> float | Tensor:
    # A scalar that is a tensor has to be where the gradient is, and plain: a DTensor takes numbers of no dimension.
    return factor.to(gradient.device) if isinstance(factor, Tensor) else factor


def _nothing() -> None:
    """No tap has collected anything."""
