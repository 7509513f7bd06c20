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
            value = self._layer(h, h_prime, reduction) if len(h) else h_prime.sum() + h.sum()
            values.append(value.to(clean[0].device))
        per_layer = torch.stack(values)
        return per_layer.mean(), per_layer.detach()

    def _layer(self, clean: Tensor, perturbed: Tensor, reduction: Reduction) -> Tensor:
        """`layer`, with what it returns checked; nothing is read from the device."""
        value = self.layer(clean, perturbed, reduction)
        if not _is_scalar(value):
            hint = "; take the mean over tokens" if isinstance(value, Tensor) and value.dim() else ""
            raise ValueError(
                f"{self._label} returned {describe(value)}; it has to return a floating-point scalar tensor{hint}."
            )
        _check_gradient(self._label, value, clean, perturbed)
        return value


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
    if not _is_scalar(loss):
        raise ValueError(f"{name} returned {describe(loss)} as the loss; it has to be a floating-point scalar tensor.")
    if not isinstance(per_layer, Tensor) or per_layer.shape != (len(clean),):
        raise ValueError(
            f"{name} returned {describe(per_layer)} as distances per layer; they have to be one detached tensor of "
            f"shape [{len(clean)}], as there are {len(clean)} layers."
        )
    _check_gradient(name, loss, *clean, *perturbed)
    return loss, per_layer


def _is_scalar(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point()


def _check_gradient(name: str, value: Tensor, *states: Tensor) -> None:
    if not value.requires_grad and torch.is_grad_enabled() and any(state.requires_grad for state in states):
        raise ValueError(
            f"{name} returned a tensor without a gradient, so the consistency term would train nothing; it has to be "
            "computed from the states without detach(), item(), numpy() or torch.no_grad()."
        )


def _wide(states: Tensor) -> Tensor:
    return states.to(torch.promote_types(states.dtype, torch.float32))
