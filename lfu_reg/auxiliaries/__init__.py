"""theta_aux, one flavour a file; docs/extending.md shows how to write another."""

from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias, get_args

from torch import nn

from lfu_reg.auxiliaries.base import Auxiliary, Call, Components, Tokens, master_dtype
from lfu_reg.auxiliaries.lora import LoRADeltas
from lfu_reg.auxiliaries.output import OutputAuxiliary
from lfu_reg.auxiliaries.random_directions import RandomDirections
from lfu_reg.auxiliaries.steering import SteeringVectors
from lfu_reg.auxiliaries.weights import WeightDeltas
from lfu_reg.diagnostics import Diagnostics
from lfu_reg.model.linears import find_linears
from lfu_reg.model.names import listed, one_of

__all__ = [
    "Auxiliary",
    "AuxiliaryName",
    "Call",
    "Components",
    "LoRADeltas",
    "OutputAuxiliary",
    "RandomDirections",
    "SteeringVectors",
    "Tokens",
    "WeightDeltas",
    "acting_in",
    "make_auxiliary",
    "master_dtype",
]

AuxiliaryName: TypeAlias = Literal["lora", "steering", "weights", "random"]

_BY_NAME: dict[AuxiliaryName, Callable[[], Auxiliary]] = {
    "lora": LoRADeltas,
    "steering": SteeringVectors,
    "weights": WeightDeltas,
    "random": lambda: RandomDirections(LoRADeltas()),
}

NO_LINEAR_MAP = (
    "The chosen layers ({}) have no linear map for LoRA deltas to act on, so steering vectors take their place. Say "
    'auxiliary="steering" or another one, and this message goes.'
)


def make_auxiliary(auxiliary: AuxiliaryName | Auxiliary) -> Auxiliary:
    """The auxiliary of that name, or the given object itself."""
    if isinstance(auxiliary, Auxiliary):
        return auxiliary
    more = ", or an object such as LoRADeltas(rank=8) or SteeringVectors(relative=True)"
    if isinstance(auxiliary, type):
        more += f": instantiate it, {auxiliary.__name__}()"
    if isinstance(auxiliary, nn.Module):
        more += "; the model comes first, LfURegularizer(model, auxiliary)"
    return _BY_NAME[one_of("auxiliary", auxiliary, get_args(AuxiliaryName), more)]()


def acting_in(
    layers: Mapping[str, nn.Module], made: Auxiliary, asked: AuxiliaryName | Auxiliary, diagnostics: Diagnostics
) -> Auxiliary:
    """`made`, or steering vectors where LoRA deltas, asked for by name or by default, have nothing to act on."""
    if isinstance(asked, Auxiliary) or not isinstance(made, LoRADeltas) or find_linears(layers):
        return made
    diagnostics.warn_once("no linear map", NO_LINEAR_MAP.format(listed(layers, 8)))
    return SteeringVectors()
