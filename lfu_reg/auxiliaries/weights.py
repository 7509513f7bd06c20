"""The trainable weights themselves as auxiliary components: theta' = theta + alpha * g / ||g||.

With PEFT these are the adapter's matrices, which is the authors' LoRA flavour; with all weights it is the ascent of SAM
(Table 6b). g is the SFT gradient that pass 1 takes anyway.

Pass 2 and its backward run with the parameters moved, and then these get back what they were to the last bit: whatever
reads them sees that, and they stay leaves. Where the backward comes later, the graph has copies of what it saved of
them. Under FSDP2 the shards are moved, and g is averaged over ranks as it reduces it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lfu_reg.auxiliaries.ascent import ascend
from lfu_reg.auxiliaries.base import Auxiliary, Generators
from lfu_reg.model.moving import moved_in_place

SHARED_MEMORY = (
    "auxiliary='weights' moves weights for pass 2, and these are in memory that is shared with other processes "
    "(share_memory(), or handed to a process that was started), which would train on moved ones. Train a "
    "copy.deepcopy(model) in each process, or use auxiliary='lora' or 'steering'."
)


class WeightDeltas(Auxiliary):
    """The model's trainable parameters.

    Args:
        only: callable of (name, parameter) that says which trainable parameters move; None is all of them.
    """

    default_alpha = 0.1
    default_lam = 5.0
    moves_weights = True

    def __init__(self, only: Callable[[str, nn.Parameter], bool] | None = None) -> None:
        self.only = only
        self._model: nn.Module | None = None
        self._parameters: dict[str, nn.Parameter] = {}
        self._deltas: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def sites(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> Mapping[str, nn.Module]:
        """Remember the model. There are no sites: nothing happens at outputs."""
        data = (p.data for p in model.parameters() if p.requires_grad and p.is_cpu and p.layout is torch.strided)
        if any(type(values) is Tensor and values.untyped_storage().is_shared() for values in data):
            raise ValueError(SHARED_MEMORY)
        self._model = model
        return {}

    def is_attached_to(self, model: nn.Module) -> bool:
        """Whether the remembered model is this one."""
        return self._model is model

    def detach(self, model: nn.Module) -> None:
        """Forget the model and its parameters; another one that was attached since is kept."""
        if self._model is model:
            self._model, self._parameters = None, {}

    def reset(self, generators: Generators) -> None:
        """Forget deltas and gradients."""
        for handle in self._handles:
            handle.remove()
        self._deltas, self._gradients, self._handles = {}, {}, []
        if self.shards is not None:
            self.shards.reshard()  # so that the parameters seen here are the shards
        # Looked up once a step: while pass 2 runs, moved tensors stand in the place of the parameters.
        found = () if self._model is None else self._model.named_parameters()
        moves = self.only or (lambda name, parameter: True)
        self._parameters = {n: p for n, p in found if p.requires_grad and moves(n, p)}

    def leaves(self) -> list[Tensor]:
        """The trainable parameters."""
        # d(theta + delta)/d delta = 1: the gradient at theta + delta is that of theta itself.
        return list(self._parameters.values())

    def gradient_from(self, leaves: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """Pick the trainable parameters' gradients out of others."""
        by_leaf = {id(leaf): gradient for leaf, gradient in zip(leaves, gradients, strict=True)}
        for name, parameter in self._parameters.items():
            self._collect(name, by_leaf.get(id(parameter)))

    def replace_gradients(self, function: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]) -> None:
        """Replace g of all trainable parameters, those without a gradient included."""
        self._gradients = dict(
            function({n: self._gradients.get(n, torch.zeros_like(p)) for n, p in self._parameters.items()})
        )

    def moved(self, *, keeps_graph: bool) -> AbstractContextManager[None]:
        """Parameter + delta instead of every parameter, or shard + delta instead of every shard."""
        pairs = [(self._parameters[name], delta) for name, delta in self._deltas.items()]
        if self.shards is not None:
            return self.shards.moved(pairs)
        # By `.data`, which counts no version: graphs of the caller's may have saved the parameters.
        return moved_in_place([(parameter.data, delta) for parameter, delta in pairs], stay_saved=keeps_graph)

    def ascend(self, alpha: float) -> Tensor:
        """Eq. 2 over all trainable parameters that got a gradient."""
        norm, steps = ascend(list(self._gradients.values()), alpha)
        for name, step in zip(self._gradients, steps, strict=True):
            self._deltas[name] = self._deltas[name] + step if name in self._deltas else step
        self._gradients = {}
        return norm

    def collect_later(self, loss: Tensor) -> None:
        """By hooks on the parameters, until the next step."""
        super().collect_later(loss)
        for name, parameter in self._parameters.items():
            arrived = partial(self._arrived, name)
            self._handles.append(parameter.register_hook(arrived))  # type: ignore[no-untyped-call]

    def _arrived(self, name: str, gradient: Tensor) -> None:
        if self._backward >= 0:  # in parts, where reentrant checkpoints have backwards of their own
            before = self._gradients.get(name)
            self._collect(name, gradient if before is None else before + gradient)

    def _collect(self, name: str, gradient: Tensor | None) -> None:
        if gradient is not None:  # as it is of a function that has given none
            self._gradients[name] = gradient.to_dense() if gradient.is_sparse else gradient

    def rescale(self, factor: float) -> bool:
        """Every delta, times `factor`."""
        self._deltas = {name: delta * factor for name, delta in self._deltas.items()}
        return True

    def perturbation(self) -> dict[str, Any]:
        """Parameter name to delta."""
        return dict(self._deltas)

    def __repr__(self) -> str:
        return "WeightDeltas()" if self.only is None else f"WeightDeltas(only={self.only!r})"
