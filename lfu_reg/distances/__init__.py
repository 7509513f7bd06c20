"""Consistency losses, one a file; a plain function of ([tokens, hidden], [tokens, hidden]) is one as well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

from torch import Tensor

from lfu_reg.distances.base import Distance, PerLayerDistance, Reduction
from lfu_reg.distances.contrastive import Contrastive
from lfu_reg.distances.cosine import Cosine
from lfu_reg.distances.logit_kl import LogitKL
from lfu_reg.distances.mse import MSE
from lfu_reg.model.names import one_of

__all__ = [
    "MSE",
    "Contrastive",
    "Cosine",
    "Distance",
    "DistanceChoice",
    "LogitKL",
    "PerLayerDistance",
    "make_distance",
]

DistanceName: TypeAlias = Literal["mse", "cosine", "contrastive", "logit_kl"]
DistanceChoice: TypeAlias = DistanceName | Distance | Callable[[Tensor, Tensor], Tensor]

_BY_NAME: dict[DistanceName, type[Distance]] = {
    "mse": MSE,
    "cosine": Cosine,
    "contrastive": Contrastive,
    "logit_kl": LogitKL,
}


def make_distance(distance: DistanceChoice) -> Distance:
    """The distance of that name, the given object, or a wrapper around the given function."""
    if isinstance(distance, Distance):
        if distance.measures not in ("hidden_states", "logits"):
            name = type(distance).__name__
            raise ValueError(f"{name}.measures={distance.measures!r}; allowed are 'hidden_states' and 'logits'.")
        return distance
    if callable(distance) and not isinstance(distance, type):
        return _Function(distance)
    more = ", a Distance object, or a function of (clean, perturbed), both [tokens, hidden], that returns a scalar"
    if isinstance(distance, type):
        more += f"; instantiate a class, {distance.__name__}()"
    return _BY_NAME[one_of("distance", distance, get_args(DistanceName), more)]()


class _Function(PerLayerDistance):
    """A user's function as a distance."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.function = function

    def layer(self, clean: Tensor, perturbed: Tensor, reduction: Reduction) -> Tensor:
        return self.function(clean, perturbed)

    @property
    def _label(self) -> str:
        return f"The distance function {self!r}"

    def __repr__(self) -> str:
        return getattr(self.function, "__name__", repr(self.function))
