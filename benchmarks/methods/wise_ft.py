"""WiSE-FT (Wortsman et al., 2021, arXiv 2109.01903): SFT, and afterwards a point on the line back to where it began.

theta = (1 - scale) theta_start + scale theta_trained

Source: the interpolation is the paper's definition of its weight-space ensemble; the equation's number was not looked
up. For LoRA, B is scaled and A stays, which is the same line for the weights B A is added to.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from methods.base import Batch, LossFunction, Method, trainable


class WiSEFT(Method):
    """The difference to the starting point, scaled after training, at no cost.

    Args:
        model: at its starting point; a LoRA adapter at "no change".
        scale: of the difference, from 0 to 1; smaller keeps more.

    Raises:
        ValueError: for DoRA, whose weights do not lie on a line.
    """

    def __init__(self, model: nn.Module, scale: float = 0.7) -> None:
        super().__init__(model)
        if not 0 <= scale <= 1:
            raise ValueError(f"scale={scale!r}; allowed are numbers from 0 to 1.")
        if any("lora_magnitude_vector" in name for name in trainable(model)):
            raise ValueError("DoRA's weights are not linear in its adapter. Use LoRA without magnitudes.")
        self.scale = scale
        self._start = {name: _start(name, p) for name, p in trainable(model).items() if not _is_lora_a(name)}
        self._trained: dict[str, Tensor] = {}

    def __call__(self, model: nn.Module, batch: Batch, sft_loss_fn: LossFunction) -> Tensor:
        """The SFT loss."""
        return sft_loss_fn(model, batch)

    def finish(self) -> None:
        """Scales the difference."""
        self.scale_to(self.scale)

    @torch.no_grad()
    def scale_to(self, scale: float) -> None:
        """Puts `scale` times the trained difference in place; one training run so serves many scales."""
        parameters = dict(self.model.named_parameters())
        for name, start in self._start.items():
            trained = self._trained.setdefault(name, parameters[name].detach().clone())
            parameters[name].copy_(start + scale * (trained - start))


def _is_lora_a(name: str) -> bool:
    return "lora_A" in name or "lora_embedding_A" in name


def _start(name: str, parameter: Tensor) -> Tensor:
    """Where the line begins: LoRA's B at zero, whatever it was, since the base model has no adapter."""
    is_lora_b = "lora_B" in name or "lora_embedding_B" in name
    return torch.zeros_like(parameter) if is_lora_b else parameter.detach().clone()
