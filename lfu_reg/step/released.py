"""Both passes' gradients are taken at once, and the returned loss hands their sum over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from lfu_reg.auxiliaries import Auxiliary
from lfu_reg.distributed.fsdp2 import Shards
from lfu_reg.hooks.forward_pass import ForwardPass
from lfu_reg.model.compile import allows_one_backward
from lfu_reg.model.graph import grad_set_aside, graph_of
from lfu_reg.step.comparison import Comparison, compare
from lfu_reg.step.float16 import LossScale, LossScales, float16_in_play
from lfu_reg.step.gradients import Pair, Pairs, Strategy, together
from lfu_reg.step.returned_loss import returned_loss
from lfu_reg.step.shared_backward import SharedBackward
from lfu_reg.step.strength import StepStrength


class Released(Strategy):
    """Gradients are taken at once and handed over by the returned loss; nothing stays in the `.grad` of `trained`."""

    _shared: SharedBackward | None = None
    _scale = _perturbed_scale = _weight = 1.0
    _perturbed: Pairs = ()

    def __init__(self, auxiliary: Auxiliary, scales: LossScales, trained: Sequence[Tensor]) -> None:
        super().__init__(auxiliary, scales, trained)
        self._gradients: dict[int, tuple[Tensor, Tensor | None]] = {}

    def backward_clean(
        self, sft_loss: Tensor, leaves: list[Tensor], clean: ForwardPass, shared: SharedBackward | None
    ) -> float:
        """One backward for everything; the taps of `clean` collect g on its way."""
        self._sft_loss, self._shared = sft_loss.detach(), shared
        self._float16 = float16_in_play(clean, [sft_loss, *leaves])
        with clean.gate.opened():
            pairs, self._scale = self._differentiate(
                sft_loss, leaves if shared is None else shared.above, self._scales.clean, clean
            )
        self._add(pairs, self._scale)
        self._gradients.pop(id(clean.anchor), None)
        if clean.observe:
            self._auxiliary.gradient_from([leaf for leaf, _ in pairs], [gradient for _, gradient in pairs])
        return self._scale

    def backward_perturbed(self, l_cons: Tensor, strength: StepStrength) -> None:
        """A second backward, of lam * l_cons where lam is fixed: users' hooks see that. Else what it brings waits."""
        self._l_cons = l_cons.detach()
        self._weight = 1.0 if isinstance(strength.lam, Tensor) or not strength.lam else strength.lam
        if l_cons.requires_grad:
            weighted = l_cons if self._weight == 1 else self._weight * l_cons
            self._perturbed, self._perturbed_scale = self._differentiate(
                weighted, graph_of(l_cons).leaves, self._scales.perturbed
            )

    def total(self, strength: StepStrength) -> Tensor:
        """The loss that hands both terms' gradients over: the second's times lam, which may follow from both."""
        if self._l_cons is not None:
            self._weigh(self._l_cons, strength)
        shared, self._shared = self._shared, None
        if shared is not None:
            self._add(self._below(shared.backward), 1.0)
        return returned_loss(self._sft_loss, self._gradients.values(), self._scale)

    def _weigh(self, l_cons: Tensor, strength: StepStrength) -> None:
        pairs, at_cut = self._without_start(self._perturbed)
        scale = self._perturbed_scale
        whole = above = None
        if strength.compares and self._shared is not None:
            (cut, arrived), is_small = self._shared.arrived, self._shared.is_small
            below = self._both_below(at_cut) if strength.is_due or is_small else None
            if below is None or not is_small:
                # What arrives at the cut stands for what lies below it, until that is measured again.
                both = [*self._gradients.values(), (cut, arrived)], [*pairs, (cut, at_cut)]
                above = self._compare(*both, scale, cut, with_product=False)
            if below is not None:
                self._add(below[0], 1.0)
                at_cut, pairs = None, [*pairs, *below[1]]
        if strength.compares and self._shared is None:
            whole = self._compare(self._gradients.values(), pairs, scale, with_product=strength.is_due)
        lam = strength.weigh(whole, above, self._sft_loss.device)
        rest = lam / self._weight
        self._add(pairs, scale, rest)
        if self._shared is not None and at_cut is not None:
            self._shared.collect(at_cut * _on(rest, at_cut))
        self._sft_loss = self._sft_loss + (lam * l_cons).to(self._sft_loss)

    def _without_start(self, pairs: Pairs) -> tuple[list[tuple[Tensor, Tensor | None]], Tensor | None]:
        """The pairs of pass 2 but for the leaf that it started from, and that one's gradient."""
        start = None if self._shared is None else self._shared.start
        return [pair for pair in pairs if pair[0] is not start], next((g for leaf, g in pairs if leaf is start), None)

    def _both_below(self, at_cut: Tensor | None) -> tuple[Pairs, Pairs] | None:
        """The shared part differentiated for each term alone, as their sum tells nothing; None if it cannot be."""
        assert self._shared is not None
        try:
            first = self._below(self._shared.backward_of_first)
        except RuntimeError as error:
            if allows_one_backward(error):
                return None
            raise
        self._shared.collect(at_cut)
        second, self._shared = self._below(self._shared.backward), None
        return first, second

    def _below(self, backward: Callable[[], Pairs]) -> Pairs:
        with grad_set_aside(self._trained) as written:
            pairs = backward()
        return [*pairs, *written]

    def _compare(
        self, first: Iterable[Pair], second: Iterable[Pair], scale: float, *beside: Tensor, with_product: bool
    ) -> Comparison | None:
        trained = [*self._trained, *beside] if self._trained else ()
        scales = self._scale, scale * self._weight
        return compare(first, second, trained, scales=scales, with_product=with_product)

    def _differentiate(
        self, loss: Tensor, leaves: list[Tensor], scale: LossScale, clean: ForwardPass | None = None
    ) -> tuple[Pairs, float]:
        edge = [] if clean is None or self._shared is None or self._shared.edge is None else [self._shared.edge]
        gate = None if clean is None else clean.gate
        forget: Callable[[], None] = self._auxiliary.forget_gradient if clean is not None else lambda: None
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
            return super().backward_explicit(sft_loss, fwd)
        pairs = self._shards.gradients_of(sft_loss, graph_of(sft_loss).leaves)
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
