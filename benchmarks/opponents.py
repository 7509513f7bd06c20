"""What LfU's step is measured against, written from the published descriptions.

* `three_forwards`: the paper's text read literally: a forward for the ascent gradient of theta_aux, one for the SFT
  loss, one for the perturbed hidden states, joined in one loss. Steering vectors as theta_aux.
* `three_forwards_lora`: the same with LoRA deltas on every linear map as theta_aux.
* `authors_lora`: the procedure of the authors' code with LoRA fine-tuning: a forward and backward on another batch
  give the gradient of the trainable adapter, whose weights are moved along it in place; a forward there; moved back;
  SFT forward and joint backward. The hidden states of all layers are collected with `output_hidden_states`.

Each takes (model, batch, sft_loss_fn) like LfURegularizer and returns a loss for the caller's backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]
LossFunction = Callable[[nn.Module, Batch], Tensor]


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks of a Llama, wrapped by PEFT or not."""
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 1)


def linears_of(model: nn.Module) -> list[nn.Module]:
    """Linear maps of the blocks; a PEFT layer counts as one."""
    from peft.tuners.lora import LoraLayer

    found: list[nn.Module] = []

    def collect(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, LoraLayer)):
            found.append(module)
        else:
            for child in module.children():
                collect(child)

    collect(blocks_of(model))
    return found


def _consistency(clean: list[Tensor], perturbed: list[Tensor], mask: Tensor) -> Tensor:
    terms = [(p[mask] - c.detach()[mask]).square().mean() for c, p in zip(clean, perturbed, strict=True)]
    return torch.stack(terms).mean()


class _Hooked:
    """Adds components at the outputs of modules and collects the outputs of the blocks, for one forward."""

    def __init__(
        self, model: nn.Module, modules: list[nn.Module], change: Callable[[int, Tensor, Tensor], Tensor] | None
    ):
        self.states: list[Tensor] = []
        self.handles = []
        if change is not None:
            for i, module in enumerate(modules):
                self.handles.append(module.register_forward_hook(lambda m, a, out, i=i: change(i, a[0], out)))
        for block in blocks_of(model):
            self.handles.append(block.register_forward_hook(lambda m, a, out: self.states.append(out)))

    def __enter__(self) -> list[Tensor]:
        return self.states

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def _three_forwards(
    model: nn.Module,
    batch: Batch,
    sft_loss_fn: LossFunction,
    modules: list[nn.Module],
    components: list[Tensor],
    change: Callable[[int, Tensor, Tensor], Tensor],
    alpha: float,
    lam: float,
) -> Tensor:
    with _Hooked(model, modules, change):
        gradients = torch.autograd.grad(sft_loss_fn(model, batch), components)
    norm = torch.stack([g.norm() for g in gradients]).norm()
    with torch.no_grad():
        for component, gradient in zip(components, gradients, strict=True):
            component += alpha * gradient / norm
            component.requires_grad_(False)
    with _Hooked(model, modules, None) as clean:
        sft_loss = sft_loss_fn(model, batch)
    with _Hooked(model, modules, change) as perturbed:
        sft_loss_fn(model, batch)
    return sft_loss + lam * _consistency(clean, perturbed, batch["labels"] != -100)


def three_forwards(
    model: nn.Module, batch: Batch, sft_loss_fn: LossFunction, alpha: float = 0.1, lam: float = 0.1
) -> Tensor:
    blocks = list(blocks_of(model))
    hidden = model.config.hidden_size
    vectors = [torch.zeros(hidden, requires_grad=True) for _ in blocks]
    return _three_forwards(model, batch, sft_loss_fn, blocks, vectors, lambda i, x, y: y + vectors[i], alpha, lam)


def three_forwards_lora(
    model: nn.Module, batch: Batch, sft_loss_fn: LossFunction, alpha: float = 0.1, lam: float = 5.0, rank: int = 8
) -> Tensor:
    linears = linears_of(model)
    a = [torch.empty(rank, m.in_features).uniform_(-1, 1) / math.sqrt(m.in_features) for m in linears]
    b = [torch.zeros(m.out_features, rank, requires_grad=True) for m in linears]

    def change(i: int, x: Tensor, y: Tensor) -> Tensor:
        return y + 2.0 * (x @ a[i].t() @ b[i].t())

    return _three_forwards(model, batch, sft_loss_fn, linears, b, change, alpha, lam)


def authors_lora(
    model: nn.Module,
    batch: Batch,
    sft_loss_fn: LossFunction,
    alpha: float = 0.1,
    lam: float = 5.0,
    other: Batch | None = None,
) -> Tensor:
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(sft_loss_fn(model, other or batch), list(trainable.values()))
    norm = torch.stack([g.norm() for g in gradients]).norm()
    # The graph of the perturbed forward must outlive the way back, so the moved weights are tensors of their own.
    moved = {name: p + alpha * g / norm for (name, p), g in zip(trainable.items(), gradients, strict=True)}
    mask = batch["labels"] != -100
    perturbed: Any = torch.func.functional_call(model, moved, (), {**batch, "output_hidden_states": True})
    clean: Any = model(**batch, output_hidden_states=True)
    return clean.loss + lam * _consistency(list(clean.hidden_states), list(perturbed.hidden_states), mask)
