"""theta_aux: what the undesirable step moves.

An auxiliary is a set of components that start every step at "no change". Pass 1 collects the gradient g of the SFT
loss with respect to them, the ascent moves them by alpha * g / ||g||, and pass 2 runs with them in place.

`Auxiliary` is what the regularizer talks to; docs/extending.md shows how to write one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lfu_reg.distributed.fsdp2 import Shards

Components: TypeAlias = tuple[Tensor, ...]
GradientRule: TypeAlias = Callable[[Tensor], Sequence[Tensor | None]]
Generators: TypeAlias = Callable[[torch.device], torch.Generator]


@dataclass(frozen=True)
class Tokens:
    """The positions of one output that count; None where all do."""

    mask: Tensor | None = None  # boolean, shaped like the output without its hidden axis
    index: Tensor | None = None  # the same as row numbers of the output flattened to [positions, hidden]
    axis: int = -1  # the hidden one of the output

    def is_empty(self) -> bool:
        """Whether no position counts."""
        return self.index is not None and self.index.numel() == 0


@dataclass(frozen=True)
class Call:
    """One call of a site."""

    name: str  # full name of the module
    module: nn.Module
    x: Tensor | None  # its first floating-point tensor argument, None if it has none
    y: Tensor  # its output; for a layer, the hidden state in it
    tokens: Tokens  # the positions of y that count


def master_dtype(tensor: Tensor) -> torch.dtype:
    """Components are kept in float32 (float64 for a float64 model) and cast to the activation at each site."""
    return torch.promote_types(tensor.dtype, torch.float32)


class Auxiliary(ABC):
    """Protocol between the regularizer and theta_aux. Subclass `OutputAuxiliary` unless you need all of it.

    Attributes:
        default_alpha, default_lam: what alpha and lam are where they are not given; the paper's values.
        moves_weights: whether the components are the model's own parameters.
        acts_at_sites: whether the components change nothing but what the sites return.
        shards: FSDP2's sharded parameters during a step, None without FSDP2; set by the regularizer.
    """

    default_alpha: float
    default_lam: float
    moves_weights = False
    acts_at_sites = False
    shards: Shards | None = None
    _backward = -1  # the running one that g is collected from

    @property
    def _label(self) -> str:
        """What error messages call it."""
        return type(self).__name__

    def default_of(self, setting: str) -> float:
        """`default_alpha` or `default_lam`; an error where the class has none, as soon as it is needed."""
        if (value := getattr(self, f"default_{setting}", None)) is None:
            raise ValueError(
                f"{setting} was not given, and {self._label} has no default_{setting}. Give "
                f"LfURegularizer(..., {setting}=...), or set default_alpha and default_lam in the class."
            )
        return float(value)

    @abstractmethod
    def sites(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> Mapping[str, nn.Module]:
        """The modules to act on, by full name. Raise ValueError, with the cure, when there are none.

        Args:
            model: the attached model.
            layers: the chosen layers by full name.
        """

    @abstractmethod
    def reset(self, generators: Generators) -> None:
        """Back to "no change", at the start of a step. `generators(device)` gives the step's seeded generator."""

    def observe(self, call: Call) -> GradientRule | None:
        """Pass 1, at a site: the rule that takes dl/dy and collects the gradient of the components there."""
        return None

    def apply_at(self, call: Call) -> Tensor:
        """Pass 2, at a site: the output with the components in place."""
        return call.y

    @abstractmethod
    def leaves(self) -> list[Tensor]:
        """What to differentiate for an explicit gradient at the current point; None gradients are allowed."""

    @abstractmethod
    def gradient_from(self, leaves: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """Collect g from gradients with respect to leaves of the loss's graph (`leaves()` or trainable weights)."""

    @abstractmethod
    def replace_gradients(self, function: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]) -> None:
        """Let g be what `function` makes of it: all of it by name, in the same order on every rank, zero for none."""

    def moved(self, *, keeps_graph: bool) -> AbstractContextManager[None]:
        """Pass 2 and its backward, for components that are no hook's business; `keeps_graph` if that comes later."""
        return nullcontext()

    @abstractmethod
    def ascend(self, alpha: float) -> Tensor:
        """Eq. 2. Move the components by alpha * g / ||g||, forget g, and return ||g||."""

    def collect_later(self, loss: Tensor) -> None:
        """Collect g from the caller's backward from `loss`, too: from the last one, where there are several."""

        def begin(gradient: Tensor) -> None:
            if self._backward != (task := torch._C._current_graph_task_id()):  # it may be the sum of several losses
                self._backward = task
                self.forget_gradient()
                torch.autograd.Variable._execution_engine.queue_callback(end)

        def end() -> None:
            self._backward = -1

        loss.register_hook(begin)  # type: ignore[no-untyped-call]

    def rescale(self, factor: float) -> bool:
        """Move the components `factor` times as far as they are; False where that is not possible."""
        return False

    @abstractmethod
    def perturbation(self) -> dict[str, Any]:
        """The components by name, detached."""

    def require_gradients(self, required: bool) -> None:  # noqa: B027  nothing to do where leaves are parameters
        """Whether components are to be leaves that require gradients, for an explicit gradient at the current point."""

    def is_attached_to(self, model: nn.Module) -> bool:
        """Whether `sites` was not asked about another model since: the weights of that one would be moved."""
        return True

    def detach(self, model: nn.Module) -> None:  # noqa: B027  most remember nothing of it
        """Forget `model`, from which the regularizer was removed."""

    def forget_gradient(self) -> None:
        """Drop what was collected of g: the backward that gave it is repeated."""
        self.ascend(0.0)
