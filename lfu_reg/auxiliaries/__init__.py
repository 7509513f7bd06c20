"""theta_aux, one flavour a file; docs/extending.md shows how to write another."""

from collections.abc import Callable

from lfu_reg.auxiliaries.base import Auxiliary, Call, Components, Tokens, master_dtype
from lfu_reg.auxiliaries.lora import LoRADeltas
from lfu_reg.auxiliaries.output import OutputAuxiliary
from lfu_reg.auxiliaries.random_directions import RandomDirections
from lfu_reg.auxiliaries.steering import SteeringVectors
from lfu_reg.auxiliaries.weights import WeightDeltas

__all__ = [
    "Auxiliary",
    "Call",
    "Components",
    "LoRADeltas",
    "OutputAuxiliary",
    "RandomDirections",
    "SteeringVectors",
    "Tokens",
    "WeightDeltas",
    "make_auxiliary",
    "master_dtype",
]

_BY_NAME: dict[str, Callable[[], Auxiliary]] = {
    "lora": LoRADeltas,
    "steering": SteeringVectors,
    "weights": WeightDeltas,
    "random": lambda: RandomDirections(LoRADeltas()),
}


def make_auxiliary(auxiliary: str | Auxiliary) -> Auxiliary:
    """The auxiliary of that name, or the given object itself."""
    if isinstance(auxiliary, Auxiliary):
        return auxiliary
    if isinstance(auxiliary, str):
        if auxiliary in _BY_NAME:
            return _BY_NAME[auxiliary]()
        raise ValueError(
            f"auxiliary={auxiliary!r}; allowed are {', '.join(map(repr, _BY_NAME))} or an Auxiliary object."
        )
    hint = " Instantiate it before passing it." if isinstance(auxiliary, type) else ""
    raise TypeError(
        f"auxiliary={auxiliary!r}; allowed are {', '.join(map(repr, _BY_NAME))} or an object such as "
        f"LoRADeltas(rank=8) or SteeringVectors(relative=True).{hint}"
    )
