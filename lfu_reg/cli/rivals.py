"""Other regularizers of fine-tuning, for what they cost: NEFTune, R-Drop and SAM.

Each is written from its paper's description, as a loss of (model, batch, sft_loss_fn); SAM is a whole step, since its
gradients belong to other weights than the model's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LossFunction = Callable[[nn.Module, Any], Tensor]


def neftune(model: nn.Module, batch: Any, sft_loss_fn: LossFunction, alpha: float = 5.0) -> Tensor:
    """Uniform noise on the embeddings, scaled by alpha / sqrt(tokens * hidden) (Jain et al., arXiv 2310.05914)."""
    embeddings: nn.Module = model.get_input_embeddings()  # type: ignore[operator]

    def add_noise(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        scale = alpha / math.sqrt(output.shape[-2] * output.shape[-1])
        return output + torch.empty_like(output).uniform_(-scale, scale)

    handle = embeddings.register_forward_hook(add_noise)
    try:
        return sft_loss_fn(model, batch)
    finally:
        handle.remove()


def r_drop(model: nn.Module, batch: Any, sft_loss_fn: LossFunction, alpha: float = 1.0) -> Tensor:
    """Every sample twice under dropout, and the KL between its predictions (Liang et al., arXiv 2106.14448).

    The loss is the mean over both copies. A model without dropout pays the same, for a divergence of zero.
    """
    twice = {key: torch.cat([value, value]) for key, value in batch.items()}
    output: Any = model(**twice)
    log_p, log_q = F.log_softmax(output.logits.float(), dim=-1).chunk(2)
    kept = batch["labels"] != -100
    log_p, log_q = log_p[kept], log_q[kept]
    forth = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    back = F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
    loss: Tensor = output.loss + alpha * (forth + back) / 4
    return loss


def sam_step(model: nn.Module, batch: Any, sft_loss_fn: LossFunction, rho: float = 0.05) -> None:
    """Gradients at theta + rho * g / ||g|| (Foret et al., 2021, arXiv 2010.01412), left in the weights' `.grad`."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(sft_loss_fn(model, batch), trainable, allow_unused=True)
    pairs = [(p, g) for p, g in zip(trainable, gradients, strict=True) if g is not None]
    norm = torch.stack([g.norm() for _, g in pairs]).norm()
    before = [p.detach().clone() for p, _ in pairs]
    try:
        with torch.no_grad():
            for p, g in pairs:
                p.add_(rho * g / norm)
        sft_loss_fn(model, batch).backward()  # type: ignore[no-untyped-call]
    finally:
        with torch.no_grad():
            for (p, _), value in zip(pairs, before, strict=True):
                p.copy_(value)
