"""How the gradients of a step are taken, and what the caller gets.

released: one backward yields d l_SFT / d theta and g, and frees the graph before pass 2 starts; a second one yields
    d l_cons / d theta; the returned loss hands their sum to the leaves. 2 forwards, 2 backwards, one graph at a time.
retained: only g is taken at once, pass 1's graph stays, and the caller's backward runs through both passes. Needed
    where gradients of leaves cannot be taken (sharded parameters), where l_cons flows back through the clean states,
    and where the graph goes on into one that the caller has made before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lfu_reg.auxiliaries import Auxiliary
from lfu_reg.distributed.engine import TENSOR_PARALLEL, Engine
from lfu_reg.distributed.fsdp2 import Shards
from lfu_reg.hooks.forward_pass import ForwardPass
from lfu_reg.model.graph import grad_set_aside, leaves_of
from lfu_reg.step.float16 import LossScale, LossScales, float16_in_play
from lfu_reg.step.returned_loss import returned_loss
from lfu_reg.step.settings import Settings
from lfu_reg.step.shared_backward import SharedBackward

SHARDED_RELEASED = (
    "strategy='released' is not available under {engine}. Use strategy='auto', or shard the model with FSDP2 "
    "(torch.distributed.fsdp.fully_shard)."
)
SHARDED_WEIGHTS = (
    "auxiliary={auxiliary!r} moves the weights, which {engine} has sharded, and here it would have to do so with a "
    "retained graph. Shard the model with FSDP2 (torch.distributed.fsdp.fully_shard) and leave strategy='auto', "
    "stop_gradient='clean' and gradient synchronisation on, or use auxiliary='lora' or 'steering'."
)

Pairs = Sequence[tuple[Tensor, "Tensor | None"]]


class Strategy(Protocol):
    """What a step asks of a strategy.

    Attributes:
        keeps_graph: whether the graphs of both passes outlive the step.
        scales_float16: whether gradients that float16 would lose are taken of a scaled loss.
    """

    keeps_graph: bool
    scales_float16: bool

    def backward_clean(
        self, sft_loss: Tensor, leaves: list[Tensor], clean: ForwardPass, shared: SharedBackward | None
    ) -> float:
        """Take g, and d l_SFT / d theta if the graph is to be released; returns what g is multiplied by.

        Args:
            sft_loss: scalar with the graph of pass 1.
            leaves: the leaves that it depends on.
            clean: pass 1.
            shared: the part of its graph whose backward waits for pass 2, if there is one.
        """

    def backward_explicit(self, sft_loss: Tensor, fwd: ForwardPass) -> float:
        """Take g at the present theta_aux from a pass of its own, whose graph is freed; returns its factor."""

    def backward_perturbed(self, consistency_term: Tensor) -> None:
        """Take d (lam * l_cons) / d theta if the graph is to be released."""

    def total(self) -> Tensor:
        """l_SFT + lam * l_cons, differentiable. Called with pass 1 in place again."""


class Released:
    """Gradients are taken at once and handed over by the returned loss.

    Args:
        auxiliary: theta_aux, which collects g.
        scales: for float16, remembered from step to step.
        trained: parameters in whose `.grad` nothing of the step's own backwards may stay.
    """

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
        return _down_to_components(sft_loss, fwd, self._auxiliary, self._scales.ascent, self._trained, float16=True)

    def backward_perturbed(self, consistency_term: Tensor) -> None:
        """A second backward, added to the first."""
        if consistency_term.requires_grad:
            self._add(*self._differentiate(consistency_term, leaves_of(consistency_term), self._scales.perturbed))
        if self._shared is not None:
            self._shared.collect(self._gradients.pop(id(self._shared.start), (None, None))[1])
        self._value = self._value + consistency_term.detach().to(self._value.device)

    def total(self) -> Tensor:
        """The loss that hands both terms' gradients over."""
        if self._shared is not None:
            with grad_set_aside(self._trained) as written:
                pairs = self._shared.backward()
            self._add([*pairs, *written], 1.0)
        return returned_loss(self._value, self._gradients.values(), self._scale)

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
        return _together(list(zip(leaves, gradients, strict=False)), written), used

    def _add(self, pairs: Pairs, scale: float) -> None:
        for leaf, gradient in pairs:
            if gradient is None:
                self._gradients.setdefault(id(leaf), (leaf, None))
                continue
            if scale != self._scale:
                gradient = _exact(gradient) * (self._scale / scale)
            _, before = self._gradients.get(id(leaf), (leaf, None))
            together = gradient if before is None else _exact(before) + _exact(gradient)
            self._gradients[id(leaf)] = leaf, together


class ReleasedShards(Released):
    """The same under FSDP2. Nothing is scaled for float16: a repeated backward would have to be repeated on all ranks.

    Args:
        auxiliary: theta_aux, which collects g.
        scales: for float16.
        shards: the sharded parameters.
    """

    scales_float16 = False

    def __init__(self, auxiliary: Auxiliary, scales: LossScales, shards: Shards) -> None:
        super().__init__(auxiliary, scales, ())
        self._shards = shards

    def backward_explicit(self, sft_loss: Tensor, fwd: ForwardPass) -> float:
        """A backward down to the components; a whole one where these are the shards."""
        auxiliary = self._auxiliary
        if not auxiliary.moves_weights:
            return _down_to_components(sft_loss, fwd, auxiliary, self._scales.ascent, (), float16=False)
        pairs = self._shards.gradients_of(sft_loss, leaves_of(sft_loss))
        auxiliary.gradient_from([leaf for leaf, _ in pairs], [gradient for _, gradient in pairs])
        return 1.0

    def _differentiate(
        self, loss: Tensor, leaves: list[Tensor], scale: LossScale, clean: ForwardPass | None = None
    ) -> tuple[Pairs, float]:
        return self._shards.gradients_of(loss, leaves), 1.0


class Retained:
    """The caller's backward runs through the graphs of both passes.

    Args:
        auxiliary: theta_aux, which collects g.
        scales: for g in float16, remembered from step to step.
        trained: parameters in whose `.grad` nothing of the step's own backwards may stay.
        may_scale: False where ranks run in lockstep, and none may repeat a backward on its own.
    """

    keeps_graph = True

    def __init__(
        self, auxiliary: Auxiliary, scales: LossScales, trained: Sequence[Tensor], *, may_scale: bool = True
    ) -> None:
        self.scales_float16 = may_scale
        self._auxiliary, self._scales, self._trained = auxiliary, scales, trained
        self._sft_loss = self._consistency_term = torch.zeros((), device="cpu")

    def backward_clean(
        self, sft_loss: Tensor, leaves: list[Tensor], clean: ForwardPass, shared: SharedBackward | None
    ) -> float:
        """A backward down to the taps, or to the weights where these are the auxiliary components."""
        self._sft_loss = sft_loss
        if not clean.observe:
            return 1.0
        auxiliary = self._auxiliary
        own = auxiliary.temporary_leaves() or (auxiliary.leaves() if auxiliary.moves_weights else [])
        with clean.gate.opened(), grad_set_aside(self._trained) as written:
            # Every tap depends on the anchor, so the way to it goes through all of them.
            gradients, scale = self._scales.clean.gradients(
                sft_loss,
                [clean.anchor, *own],
                float16=self.scales_float16 and float16_in_play(clean, [sft_loss, *leaves]),
                keep_graph=True,
                gate=clean.gate,
                forget=auxiliary.forget_gradient,
            )
        pairs = _together(list(zip(own, gradients[1:], strict=True)), written)
        auxiliary.gradient_from([leaf for leaf, _ in pairs], [gradient for _, gradient in pairs])
        return scale

    def backward_explicit(self, sft_loss: Tensor, fwd: ForwardPass) -> float:
        """A backward down to the components."""
        scale, float16 = self._scales.ascent, self.scales_float16
        return _down_to_components(sft_loss, fwd, self._auxiliary, scale, self._trained, float16=float16)

    def backward_perturbed(self, consistency_term: Tensor) -> None:
        """Nothing but a note of the term."""
        self._consistency_term = consistency_term

    def total(self) -> Tensor:
        """The plain sum."""
        return self._sft_loss + self._consistency_term.to(self._sft_loss.device)


def choose_strategy(
    settings: Settings, engine: Engine, auxiliary: Auxiliary, scales: LossScales, trained: Sequence[Tensor]
) -> Strategy:
    """The strategy of one step.

    Raises:
        ValueError: where the engine's sharded parameters rule out what was asked for.
    """
    retained = settings.strategy == "retained" or settings.stop_gradient != "clean"
    if not engine.is_sharded:
        return Retained(auxiliary, scales, trained) if retained else Released(auxiliary, scales, trained)
    shards = engine.shards
    if settings.strategy == "released" and shards is None:
        raise ValueError(SHARDED_RELEASED.format(engine=engine.name))
    # Only a retained graph brings FSDP2 to reduce what earlier backward passes have left unreduced.
    if not retained and shards is not None and not shards.have_pending_gradients():
        return ReleasedShards(auxiliary, scales, shards)
    parallel = engine.name == TENSOR_PARALLEL
    if auxiliary.moves_weights and not parallel:
        raise ValueError(SHARDED_WEIGHTS.format(auxiliary=auxiliary, engine=engine.name))
    return Retained(auxiliary, scales, trained if parallel else (), may_scale=False)


def _down_to_components(
    sft_loss: Tensor,
    fwd: ForwardPass,
    auxiliary: Auxiliary,
    scale: LossScale,
    trained: Sequence[Tensor],
    *,
    float16: bool,
) -> float:
    leaves = auxiliary.leaves()
    in_play = float16 and float16_in_play(fwd, [sft_loss, *leaves])
    with grad_set_aside(trained) as written:
        gradients, used = scale.gradients(sft_loss, leaves, float16=in_play)
    pairs = _together(list(zip(leaves, gradients, strict=True)), written if auxiliary.moves_weights else [])
    auxiliary.gradient_from([leaf for leaf, _ in pairs], [gradient for _, gradient in pairs])
    return used


def _together(pairs: Pairs, written: Pairs) -> Pairs:
    """Pairs of one leaf each, from gradients that were returned and those that were found in `.grad`."""
    if not written:
        return pairs
    found = {id(leaf): (leaf, gradient) for leaf, gradient in pairs}
    for leaf, gradient in written:
        before = found.get(id(leaf), (leaf, None))[1]
        found[id(leaf)] = leaf, gradient if before is None or gradient is None else before + gradient
    return list(found.values())


def _exact(gradient: Tensor) -> Tensor:
    # Scaled gradients fill the range of float16, and their sum would leave it.
    return gradient.float() if gradient.dtype is torch.float16 else gradient


def _nothing() -> None:
    """No tap has collected anything."""
