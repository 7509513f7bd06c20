"""l_cons: how far the perturbed states are from the clean ones, over the tokens that count and all layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from lfu_reg.model.outputs import describe
from lfu_reg.model.tokens import rows

Reduction: TypeAlias = Literal["mean", "sum"]


class Distance(ABC):
    """A consistency loss.

    Attributes:
        measures: "hidden_states" compares the outputs of the chosen layers, "logits" those of the whole model.
    """

    measures: Literal["hidden_states", "logits"] = "hidden_states"

    @abstractmethod
    def __call__(
        self,
        clean: Sequence[Tensor],
        perturbed: Sequence[Tensor],
        token_index: Sequence[Tensor | None],
        reduction: Reduction,
    ) -> tuple[Tensor, Tensor]:
        """Mean over layers of the distance between states.

        Args:
            clean: K tensors [..., hidden_l], from the pass without the perturbed components.
            perturbed: K tensors of the same shapes, from the pass with them.
            token_index: per layer, the numbers of the positions (leading dimensions flattened) that count, or None for
                all.
            reduction: "mean" or "sum" over the hidden dimension, where the distance has one to reduce.

        Returns:
            The scalar loss, float32 or wider, and the detached per-layer distances [K].
        """

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class PerLayerDistance(Distance):
    """A distance that looks at one layer at a time."""

    @property
    def _label(self) -> str:
        """What error messages call `layer`."""
        return f"{type(self).__name__}.layer"

    @abstractmethod
    def layer(self, clean: Tensor, perturbed: Tensor, reduction: Reduction) -> Tensor:
        """Scalar distance of one layer from [tokens, hidden] tensors, float32 or wider, with at least one token."""

    def __call__(
        self,
        clean: Sequence[Tensor],
        perturbed: Sequence[Tensor],
        token_index: Sequence[Tensor | None],
        reduction: Reduction,
    ) -> tuple[Tensor, Tensor]:
        """Mean over layers of `layer`; a layer without a token that counts contributes exactly zero."""
        values = []
        for h, h_prime, index in zip(clean, perturbed, token_index, strict=True):
            h, h_prime = _wide(rows(h, index=index)), _wide(rows(h_prime, index=index))
            # The empty sum keeps the graph, so that an empty mask gives zero gradients and not none.
            value = h_prime.sum() + h.sum()
            if len(h):
                value = self.layer(h, h_prime, reduction)
                _check_loss(self._label, value, h, h_prime)
            values.append(value.to(clean[0].device))
        per_layer = torch.stack(values)
        return per_layer.mean(), per_layer.detach()


def measure(
    distance: Distance,
    clean: Sequence[Tensor],
    perturbed: Sequence[Tensor],
    token_index: Sequence[Tensor | None],
    reduction: Reduction,
) -> tuple[Tensor, Tensor]:
    """What `distance` returns, checked; nothing is read from the device."""
    result: Any = distance(clean, perturbed, token_index, reduction)
    name = f"{type(distance).__name__}.__call__"
    if not isinstance(result, tuple) or len(result) != 2:
        raise ValueError(f"{name} returned {describe(result)}; it has to return a pair: (loss, distances per layer).")
    loss, per_layer = result
    _check_loss(name, loss, *clean, *perturbed, what=" as the loss")
    if not isinstance(per_layer, Tensor) or per_layer.shape != (len(clean),):
        raise ValueError(
            f"{name} returned {describe(per_layer)} as distances per layer; they have to be one detached tensor of "
            f"shape [{len(clean)}], as there are {len(clean)} layers."
        )
    return loss, per_layer


def _check_loss(name: str, value: object, *states: Tensor, what: str = "") -> None:
    if not isinstance(value, Tensor) or value.dim() > 0 or not value.is_floating_point():
        raise ValueError(
            f"{name} returned {describe(value)}{what}; it has to return a floating-point scalar tensor, the mean over "
            "tokens."
        )
    if not value.requires_grad and torch.is_grad_enabled() and any(state.requires_grad for state in states):
        raise ValueError(
            f"{name} returned a tensor without a gradient, so the consistency term would train nothing; it has to be "
            "computed from the states without detach(), item(), numpy() or torch.no_grad()."
        )


def _wide(states: Tensor) -> Tensor:
    return states.to(torch.promote_types(states.dtype, torch.float32))
