"""The control: steps of the same length in a random direction, which shows whether the gradient's direction matters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lfu_reg.auxiliaries.base import Call, Components, GradientRule
from lfu_reg.auxiliaries.output import OutputAuxiliary


class RandomDirections(OutputAuxiliary):
    """The components of another auxiliary, moved along standard normal noise instead of the gradient.

    Args:
        of: the auxiliary whose components are moved, for example `LoRADeltas()` or `SteeringVectors()`.
    """

    def __init__(self, of: OutputAuxiliary) -> None:
        super().__init__()
        if not isinstance(of, OutputAuxiliary):
            raise TypeError(
                f"RandomDirections({type(of).__name__}): allowed are auxiliaries that act on outputs, such as "
                "LoRADeltas() and SteeringVectors()."
            )
        self.of = of

    def default_of(self, setting: str) -> float:
        """That of the other auxiliary."""
        return self.of.default_of(setting)

    @property
    def _label(self) -> str:
        """Names the other auxiliary as well, whose methods are called."""
        return f"RandomDirections({self.of._label})"

    def sites(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> Mapping[str, nn.Module]:
        """Those of the other auxiliary."""
        return self.of.sites(model, layers)

    def start(self, call: Call, generator: torch.Generator) -> Components:
        """Those of the other auxiliary."""
        return self.of.start(call, generator)

    def apply(self, components: Components, call: Call) -> Tensor:
        """As the other auxiliary does."""
        return self.of.apply(components, call)

    def gradient_rule(self, components: Components, call: Call) -> GradientRule:
        """As the other auxiliary does."""
        return self.of.gradient_rule(components, call)

    def groups(self, names: Sequence[str]) -> Sequence[int] | None:
        """As the other auxiliary does."""
        return self.of.groups(names)

    def direction(self, gradients: list[Tensor]) -> list[Tensor]:
        """Noise of the gradients' shapes, from the step's generator; none where nothing has a gradient, as LoRA's A."""
        return [
            torch.randn(g.shape, generator=self._generators(g.device), dtype=g.dtype, device=g.device) * g.any()
            for g in gradients
        ]

    def __repr__(self) -> str:
        return f"RandomDirections({self.of!r})"
