"""Learning from the Undesirable in all flavours, as a method among the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lfu_reg import Auxiliary, LfURegularizer, LoRADeltas, RandomDirections, SteeringVectors, WeightDeltas
from methods.base import Batch, LossFunction, Method

FLAVOURS: dict[str, Callable[[], Auxiliary]] = {
    "lora": LoRADeltas,
    "steering": SteeringVectors,
    "relative-steering": lambda: SteeringVectors(relative=True),
    "per-layer-steering": lambda: SteeringVectors(norm="per-layer"),
    "weights": WeightDeltas,
    "random": lambda: RandomDirections(LoRADeltas()),
    "random-steering": lambda: RandomDirections(SteeringVectors()),
}


class LfU(Method):
    """LfURegularizer.

    Args:
        model: what is fine-tuned.
        flavour: one of FLAVOURS.
        options: of `LfURegularizer`; `anneal_steps` lets lam fall linearly to zero over so many steps.
    """

    def __init__(
        self, model: nn.Module, flavour: str = "lora", anneal_steps: int | None = None, **options: Any
    ) -> None:
        super().__init__(model)
        if anneal_steps:
            weight = float(options["lam"])
            options["lam"] = lambda step: weight * max(0.0, 1 - step / anneal_steps)
        self.reg = LfURegularizer(model, FLAVOURS[flavour](), **options)

    def __call__(self, model: nn.Module, batch: Batch, sft_loss_fn: LossFunction) -> Tensor:
        """l_SFT + lam * l_cons."""
        return self.reg(model, batch, sft_loss_fn)

    def finish(self) -> None:
        """Hooks off."""
        self.reg.remove()
