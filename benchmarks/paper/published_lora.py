"""LfU LoRA as the published code has it: its checkpointing runs pass 2 again with the weights already moved back.

The trainable weights are moved in place along the gradient of -l_SFT's ascent, pass 2 runs, and they are moved back.
With checkpointing no block keeps what its backward needs but runs its forward again, then at the weights as they were.
So l_cons is that of the moved weights, and its gradient goes back through the other ones: an error of the order of
alpha. PyTorch does not notice, with either kind of checkpointing; without checkpointing it refuses such a backward.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from methods.base import Batch, LossFunction, Method, global_norm, trainable
from torch import Tensor, nn

from paper.states import collected, distance


class PublishedLoRA(Method):
    """l_SFT + lam * (distance of the states at the moved weights to the clean ones).

    Args:
        model: with checkpointing.
        others: batches that the direction comes from, without end; None for the batch itself.
        states: names of the modules whose outputs are compared.
        alpha: length of the move.
        lam: weight of the distance.
    """

    def __init__(
        self, model: nn.Module, others: Iterator[Batch] | None, states: list[str], *, alpha: float, lam: float
    ) -> None:
        super().__init__(model)
        self.others, self.alpha, self.lam = others, alpha, lam
        self.modules = [model.get_submodule(name) for name in states]

    def __call__(self, model: nn.Module, batch: Batch, sft_loss_fn: LossFunction) -> Tensor:
        """The loss of one batch; the weights end where they were."""
        parameters = list(trainable(model).values())
        other = batch if self.others is None else next(self.others)
        direction = list(torch.autograd.grad(sft_loss_fn(model, other), parameters))
        starts = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            torch._foreach_add_(parameters, direction, alpha=self.alpha / float(global_norm(direction)))
            torch.clear_autocast_cache()  # it would go on with the weights as they were
        with collected(self.modules) as perturbed:
            sft_loss_fn(model, batch)
        with torch.no_grad():
            torch._foreach_copy_(parameters, starts)
            torch.clear_autocast_cache()
        with collected(self.modules) as clean:
            sft_loss = sft_loss_fn(model, batch)
        return sft_loss + self.lam * distance(perturbed, clean, batch["labels"])
