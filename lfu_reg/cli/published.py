"""What LfU's step is measured against: the published procedures, written from their descriptions.

* `three_forwards`: the paper's text read literally: a forward for the ascent gradient of theta_aux, one for the SFT
  loss, one for the perturbed hidden states, joined in one loss. Steering vectors as theta_aux.
* `three_forwards_lora`: the same with LoRA deltas on every linear map as theta_aux.
* `authors_lora`: the procedure of the authors' code with LoRA fine-tuning: a forward and backward on another batch
  give the gradient of the trainable adapter, whose weights are moved along it; a forward there; moved back; SFT
  forward and joint backward. The hidden states of all layers are collected with `output_hidden_states`.

Each takes (model, batch, sft_loss_fn) like LfURegularizer and returns a loss for the caller's backward. None of it
shares code with the library's step but for finding blocks and linear maps, nor with the tests' oracle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

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
    hidden = hidden_size(model)
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
    loss: Tensor = clean.loss + lam * distance(clean.hidden_states, perturbed.hidden_states, response_mask(batch))
    return loss


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
    with hooked(blocks, modules, change):
        gradients = torch.autograd.grad(sft_loss_fn(model, batch), components)
    norm = torch.stack([g.norm() for g in gradients]).norm()
    with torch.no_grad():
        for component, gradient in zip(components, gradients, strict=True):
            component += alpha * gradient / norm
            component.requires_grad_(False)
    with hooked(blocks, (), None) as clean:
        sft_loss = sft_loss_fn(model, batch)
    with hooked(blocks, modules, change) as perturbed:
        sft_loss_fn(model, batch)
    return sft_loss + lam * distance(clean, perturbed, response_mask(batch))


def distance(fixed: Sequence[Tensor], moving: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    """Mean squared difference of the states at the mask's positions, averaged over layers; `fixed` gets no gradient."""

    def selected(state: Tensor) -> Tensor:
        return state if mask is None or mask.shape != state.shape[:-1] else state[mask]

    terms = [(selected(m) - selected(f.detach())).square().mean() for f, m in zip(fixed, moving, strict=True)]
    return torch.stack(terms).mean()


def response_mask(batch: Any) -> Tensor | None:
    """Where labels count; None for a batch without them."""
    labels = batch.get("labels") if hasattr(batch, "get") else None
    return None if labels is None else labels != -100


def hidden_size(model: nn.Module) -> int:
    """As the configuration of transformers says."""
    config: Any = model.config
    return int(config.get_text_config().hidden_size)


@contextmanager
def hooked(blocks: Sequence[nn.Module], modules: Sequence[nn.Module], change: Change | None) -> Any:
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


class Loss(Protocol):
    """Called like LfURegularizer."""

    def __call__(self, model: nn.Module, batch: Any, sft_loss_fn: LossFunction, /) -> Tensor:
        """Scalar loss whose backward gives the gradient of the procedure."""


@dataclass(frozen=True)
class Procedure:
    """Another way to train that can be measured beside LfU.

    Attributes:
        label: its name in tables.
        make: returns the loss for a model that is to be trained.
        of_transformers: whether it reads the model's configuration or the batch's keys.
    """

    label: str
    make: Callable[[nn.Module], Loss]
    of_transformers: bool = False


# By key on the command line. The project's benchmarks add further methods here.
PROCEDURES = {
    "literal-steering": Procedure("literal steering, 3 forwards", lambda model: three_forwards, of_transformers=True),
    "literal-lora": Procedure("literal LoRA, 3 forwards", lambda model: three_forwards_lora),
    "authors-lora": Procedure("authors' LoRA procedure", lambda model: authors_lora, of_transformers=True),
}
