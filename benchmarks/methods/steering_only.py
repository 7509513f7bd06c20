"""A control: nothing is trained but one vector a block, added to its output at every position (a bias)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lfu_reg.cli.published import hidden_size
from methods.base import Batch, LossFunction, Method, blocks_of, hidden_state


class SteeringOnly(Method):
    """SFT of steering vectors, which start at zero; all other parameters, an adapter's too, are frozen.

    It isolates capacity: how much is kept merely because little can change. The vectors are parameters of the blocks,
    so make the optimizer afterwards. They belong to the tuned model, and their hooks stay on after `finish`.

    Args:
        model: at its starting point, with `config`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        model.requires_grad_(False)
        for block in blocks_of(model):
            like = next(block.parameters())
            vector = torch.zeros(hidden_size(model), dtype=like.dtype, device=like.device)
            block.register_parameter("steering_vector", nn.Parameter(vector))
            block.register_forward_hook(_steer)

    def __call__(self, model: nn.Module, batch: Batch, sft_loss_fn: LossFunction) -> Tensor:
        """The SFT loss."""
        return sft_loss_fn(model, batch)


def _steer(block: Any, args: Any, output: Any) -> Any:
    """A block's output with its vector added."""
    steered = hidden_state(output) + block.steering_vector
    return steered if isinstance(output, Tensor) else (steered, *output[1:])
