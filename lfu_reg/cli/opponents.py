"""What LfU's step is measured against: other ways to LfU, written from the published descriptions.

* `three_forwards`: the paper's text read literally: a forward for the ascent gradient of theta_aux, one for the SFT
  loss, one for the perturbed hidden states, joined in one loss. Steering vectors as theta_aux.
* `three_forwards_lora`: the same with LoRA deltas on every linear map as theta_aux.
* `authors_lora`: the procedure of the authors' code with LoRA fine-tuning: a forward and backward on another batch
  give the gradient of the trainable adapter, whose weights are moved along it; a forward there; moved back; SFT
  forward and joint backward. The hidden states of all layers are collected with `output_hidden_states`.
* `AuthorsSteering`: the procedure of the authors' steering code: vectors that are drawn once and trained with Adam on
  -l_SFT, a perturbed pass in eval mode whose states are detached, and the gradient through the clean ones.

Each takes (model, batch, sft_loss_fn) like LfURegularizer and returns a loss for the caller's backward. None of it
shares code with the library's step but for finding blocks and linear maps, nor with the tests' oracle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lfu_reg.model.layers import choose_layers
from lfu_reg.model.linears import find_linears, linear_sizes

LossFunction = Callable[[nn.Module, Any], Tensor]
Change = Callable[[int, Tensor, Tensor], Tensor]


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The model's blocks."""
    return list(choose_layers(model, "all").values())


def hidden_in(output: Any) -> Tensor:
    """The hidden state in what a block returned."""
    hidden: Tensor = output if isinstance(output, Tensor) else output[0]
    return hidden


def three_forwards(
    model: nn.Module, batch: Any, sft_loss_fn: LossFunction, alpha: float = 0.1, lam: float = 0.1
) -> Tensor:
    """The text, literally, with steering vectors."""
    blocks = blocks_of(model)
    like = next(model.parameters())
    hidden = _hidden_size(model)
    vectors = [torch.zeros(hidden, device=like.device, requires_grad=True) for _ in blocks]

    def change(i: int, x: Tensor, y: Tensor) -> Tensor:
        return y + vectors[i].to(y.dtype)

    return _three_forwards(model, batch, sft_loss_fn, blocks, vectors, change, alpha, lam)


def three_forwards_lora(
    model: nn.Module, batch: Any, sft_loss_fn: LossFunction, alpha: float = 0.1, lam: float = 5.0, rank: int = 8
) -> Tensor:
    """The text, literally, with LoRA deltas scaled by two."""
    linears = list(find_linears(choose_layers(model, "all")).values())
    sizes = [linear_sizes(linear) or (0, 0) for linear in linears]
    device = next(model.parameters()).device
    a = [torch.empty(rank, n, device=device).uniform_(-1, 1) / math.sqrt(n) for n, _ in sizes]
    b = [torch.zeros(n, rank, device=device, requires_grad=True) for _, n in sizes]

    def change(i: int, x: Tensor, y: Tensor) -> Tensor:
        return y + 2.0 * (x.to(y.dtype) @ a[i].to(y.dtype).t() @ b[i].to(y.dtype).t())

    return _three_forwards(model, batch, sft_loss_fn, linears, b, change, alpha, lam)


def authors_lora(
    model: nn.Module, batch: Any, sft_loss_fn: LossFunction, alpha: float = 0.1, lam: float = 5.0, other: Any = None
) -> Tensor:
    """The authors' procedure with the trainable weights as theta_aux."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(sft_loss_fn(model, other or batch), list(trainable.values()))
    norm = torch.stack([g.norm() for g in gradients]).norm()
    # The graph of the perturbed forward must outlive the way back, so the moved weights are tensors of their own.
    moved = {name: p + alpha * g / norm for (name, p), g in zip(trainable.items(), gradients, strict=True)}
    perturbed: Any = torch.func.functional_call(model, moved, (), {**batch, "output_hidden_states": True})
    clean: Any = model(**batch, output_hidden_states=True)
    loss: Tensor = clean.loss + lam * _distance(clean.hidden_states, perturbed.hidden_states, _mask(batch))
    return loss


class AuthorsSteering:
    """The authors' procedure with one persistent vector per block.

    Args:
        model: its blocks are steered.
        length: of the turn, relative to a hidden state of length one.
        learning_rate: of the vectors' Adam.
    """

    def __init__(self, model: nn.Module, length: float = 0.1, learning_rate: float = 1e-3) -> None:
        self.blocks = blocks_of(model)
        self.length = length
        device = next(model.parameters()).device
        self.vectors = [torch.randn(_hidden_size(model), device=device, requires_grad=True) for _ in self.blocks]
        self.adam = torch.optim.Adam(self.vectors, lr=learning_rate)

    def __call__(self, model: nn.Module, batch: Any, sft_loss_fn: LossFunction, lam: float = 0.1) -> Tensor:
        """The loss of one step."""
        model.eval()
        try:
            with _hooked(self.blocks, self.blocks, self._turn) as perturbed:
                ascent = -sft_loss_fn(model, batch)
        finally:
            model.train()
        for vector, gradient in zip(self.vectors, torch.autograd.grad(ascent, self.vectors), strict=True):
            vector.grad = gradient
        self.adam.step()
        with _hooked(self.blocks, (), None) as clean:
            sft_loss = sft_loss_fn(model, batch)
        # The detached side is the perturbed one here.
        return sft_loss + lam * _distance(perturbed, clean, _mask(batch))

    def _turn(self, i: int, x: Tensor, y: Tensor) -> Tensor:
        norm = y.norm(dim=-1, keepdim=True)
        vector = self.vectors[i] / self.vectors[i].norm()
        turned = y / norm + self.length * vector.to(y.dtype)
        result: Tensor = norm * turned / turned.norm(dim=-1, keepdim=True)
        return result


def _three_forwards(
    model: nn.Module,
    batch: Any,
    sft_loss_fn: LossFunction,
    modules: Sequence[nn.Module],
    components: list[Tensor],
    change: Change,
    alpha: float,
    lam: float,
) -> Tensor:
    blocks = blocks_of(model)
    with _hooked(blocks, modules, change):
        gradients = torch.autograd.grad(sft_loss_fn(model, batch), components)
    norm = torch.stack([g.norm() for g in gradients]).norm()
    with torch.no_grad():
        for component, gradient in zip(components, gradients, strict=True):
            component += alpha * gradient / norm
            component.requires_grad_(False)
    with _hooked(blocks, (), None) as clean:
        sft_loss = sft_loss_fn(model, batch)
    with _hooked(blocks, modules, change) as perturbed:
        sft_loss_fn(model, batch)
    return sft_loss + lam * _distance(clean, perturbed, _mask(batch))


def _distance(fixed: Sequence[Tensor], moving: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    def selected(state: Tensor) -> Tensor:
        return state if mask is None or mask.shape != state.shape[:-1] else state[mask]

    terms = [(selected(m) - selected(f.detach())).square().mean() for f, m in zip(fixed, moving, strict=True)]
    return torch.stack(terms).mean()


def _mask(batch: Any) -> Tensor | None:
    labels = batch.get("labels") if hasattr(batch, "get") else None
    return None if labels is None else labels != -100


def _hidden_size(model: nn.Module) -> int:
    config: Any = model.config
    return int(config.get_text_config().hidden_size)


@contextmanager
def _hooked(blocks: Sequence[nn.Module], modules: Sequence[nn.Module], change: Change | None) -> Any:
    """Changes the outputs of `modules` and collects those of `blocks`, for one forward."""
    states: list[Tensor] = []

    def changed(i: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            assert change is not None
            x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), hidden_in(output))
            y = change(i, x, hidden_in(output))
            return y if isinstance(output, Tensor) else (y, *output[1:])

        return hook

    with ExitStack() as handles:
        if change is not None:
            for i, module in enumerate(modules):
                handles.callback(module.register_forward_hook(changed(i), with_kwargs=True).remove)
        for block in blocks:
            handle = block.register_forward_hook(lambda m, a, output: states.append(hidden_in(output)))
            handles.callback(handle.remove)
        yield states
