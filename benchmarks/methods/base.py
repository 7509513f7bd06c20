"""What a fine-tuning method is: one call in place of the loss function, as `LfURegularizer` is one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]
LossFunction = Callable[[Any, Any], Tensor]
IGNORED = -100


class Method(ABC):
    """`method.prepare(batches, sft_loss_fn)` once; at every step `loss = method(model, batch, sft_loss_fn)`, then
    `loss.backward()`, `optimizer.step()`, `method.after_step()`; at the end `method.finish()`.

    Args:
        model: what is fine-tuned, at its starting point.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @abstractmethod
    def __call__(self, model: nn.Module, batch: Batch, sft_loss_fn: LossFunction) -> Tensor:
        """Scalar loss whose backward gives the method's gradient."""

    def prepare(self, batches: Iterable[Batch], sft_loss_fn: LossFunction) -> None:  # noqa: B027  few need to
        """To be called once before the first step, with batches that hold the whole training set."""

    def after_step(self) -> None:  # noqa: B027  most methods have nothing to do
        """To be called after every optimizer step."""

    def finish(self) -> None:  # noqa: B027
        """To be called once after training, before the model is used; takes hooks off."""


class SFT(Method):
    """Plain supervised fine-tuning (Eq. 1)."""

    def __call__(self, model: nn.Module, batch: Batch, sft_loss_fn: LossFunction) -> Tensor:
        """The loss itself."""
        return sft_loss_fn(model, batch)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q), mean over tokens (zero of none), from log-probabilities [tokens, vocabulary]."""
    return torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True) / max(len(log_p), 1)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks whose outputs are the hidden states."""
    return list(next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 1))


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that require gradients, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def hidden_state(output: Any) -> Tensor:
    """The hidden state in what a block returns."""
    return output if isinstance(output, Tensor) else output[0]


def on_tokens(hidden: Tensor, labels: Tensor) -> Tensor:
    """Rows of a hidden state [batch, tokens, hidden] at response tokens, labels unshifted as in the authors' code."""
    return hidden[labels != IGNORED]


def global_norm(tensors: list[Tensor]) -> Tensor:
    """L2 norm over all tensors together."""
    return torch.stack([t.norm() for t in tensors]).norm()
