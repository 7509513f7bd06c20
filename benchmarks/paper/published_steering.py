"""LfU RepS as the published code has it, which is not Eq. 2 to 5 with steering vectors.

A vector per block is drawn once and trained with Adam on -l_SFT of another batch. Its direction turns what the block
returns and keeps its length: h <- |h| * normalise(h/|h| + 0.1 d/|d|). The states of that other batch, perturbed so in
eval mode, are the fixed side; the gradient goes through the clean states of the training batch.

Three things keep this from being Eq. 5: the two sides belong to different texts, so that their distance does not
vanish without a perturbation; the gradient goes through the clean side; and the entries of a vector are of size one,
where a step of Adam at 1e-4 is below the spacing of bfloat16, so that in bfloat16 the vectors practically never move.

The published files do not say all. Ours are: the states are cut to the batch size and the length that both batches
have, a single sample is broadcast, and the positions are the training batch's response tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from methods.base import Batch, LossFunction, Method, hidden_state
from torch import Tensor, nn

from lfu_reg.model.layers import choose_layers
from paper.states import collected, distance


class PublishedSteering(Method):
    """l_SFT + lam * (distance of the clean states to the perturbed ones of another batch).

    Args:
        model: whose blocks are steered.
        others: batches for the perturbed states, without end.
        states: names of the modules whose outputs are compared.
        alpha: length of the turn, relative to a hidden state of length one.
        lam: weight of the distance.
        lr: of the vectors' Adam.
        seed: of the vectors.
    """

    def __init__(
        self,
        model: nn.Module,
        others: Iterator[Batch],
        states: list[str],
        *,
        alpha: float = 0.1,
        lam: float = 0.1,
        lr: float = 1e-4,
        seed: int = 42,
    ) -> None:
        super().__init__(model)
        self.others, self.alpha, self.lam = others, alpha, lam
        self.blocks = list(choose_layers(model, "all").values())
        self.modules = [model.get_submodule(name) for name in states]
        embeddings: Any = model.get_input_embeddings()
        weight, generator = embeddings.weight, torch.Generator().manual_seed(seed)
        draws = [torch.randn(weight.shape[1], generator=generator) for _ in self.blocks]
        self.vectors = [d.to(weight.device, weight.dtype).requires_grad_() for d in draws]
        self.adam = torch.optim.Adam(self.vectors, lr=lr)

    def __call__(self, model: nn.Module, batch: Batch, sft_loss_fn: LossFunction) -> Tensor:
        """The loss of one batch; moves the vectors."""
        perturbed = self._perturbed(model, next(self.others), sft_loss_fn)
        with collected(self.modules) as clean:
            sft_loss = sft_loss_fn(model, batch)
        return sft_loss + self.lam * distance(clean, perturbed, batch["labels"])

    def _perturbed(self, model: nn.Module, batch: Batch, sft_loss_fn: LossFunction) -> list[Tensor]:
        """States under the vectors, in eval mode, before the vectors' own step."""
        model.eval()
        try:
            with ExitStack() as hooks:
                for block, vector in zip(self.blocks, self.vectors, strict=True):
                    hooks.callback(block.register_forward_hook(self._turn(vector)).remove)
                with collected(self.modules) as states:
                    ascent = -sft_loss_fn(model, batch)
        finally:
            model.train()
        for vector, gradient in zip(self.vectors, torch.autograd.grad(ascent, self.vectors), strict=True):
            vector.grad = gradient
        self.adam.step()
        return [h.detach() for h in states]

    def _turn(self, vector: Tensor) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            h = hidden_state(output)
            length = h.norm(dim=-1, keepdim=True)
            turned = h / length + self.alpha * (vector / vector.norm()).to(h.dtype)
            turned = length * turned / turned.norm(dim=-1, keepdim=True)
            return turned if isinstance(output, Tensor) else (turned, *output[1:])

        return hook
