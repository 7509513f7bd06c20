"""LoRA deltas: a low-rank term beside every linear map of the chosen layers.

            ┌────────── W ──────────┐
        x ──┤                       (+)──► y' = W x + s B A x
            └── A ──► z = A x ── B ─┘         A: [rank, in]   B: [out, rank]   s = lora_alpha / rank

A is drawn anew at every step and B starts at zero, so y' = y, dl/dA = 0 and dl/dB = s (dl/dy)^T z: the ascent moves B.
Where a LoRA adapter is trained anyway, `peft_folding.py` widens it instead, without a tap on y.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lfu_reg.auxiliaries.base import Call, Components, Generators, GradientRule, master_dtype
from lfu_reg.auxiliaries.output import OutputAuxiliary
from lfu_reg.auxiliaries.peft_folding import Fold
from lfu_reg.distributed.tensor_parallel import replicated
from lfu_reg.model import peft as adapters
from lfu_reg.model.linears import TargetModules, find_linears, linear_sizes
from lfu_reg.model.patching import Patch
from lfu_reg.model.peft import PlainLoRA
from lfu_reg.model.tokens import rows


class LoRADeltas(OutputAuxiliary):
    """Low-rank deltas on linear maps (the LoRA flavour as the paper's text has it).

    Args:
        rank: rank r of every delta.
        lora_alpha: the deltas are scaled by lora_alpha / rank.
        target_modules: which linear maps of the chosen layers, in PEFT's grammar: "all-linear", a regular expression
            for whole names, or a list of name endings.
    """

    default_alpha = 0.1
    default_lam = 5.0

    def __init__(self, rank: int = 8, lora_alpha: float = 16, target_modules: TargetModules = "all-linear") -> None:
        super().__init__()
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise ValueError(f"rank={rank!r}; allowed are whole numbers from 1.")
        if not math.isfinite(lora_alpha) or lora_alpha <= 0:
            raise ValueError(f"lora_alpha={lora_alpha!r}; allowed are positive numbers.")
        self.rank = rank
        self.lora_alpha = lora_alpha
        self.target_modules = target_modules
        self._model: nn.Module | None = None
        self._linears: Mapping[str, nn.Module] = {}
        self._adapters: dict[str, PlainLoRA] = {}
        self._later: dict[str, Tensor] = {}

    @property
    def scale(self) -> float:
        """The factor lora_alpha / rank."""
        return self.lora_alpha / self.rank

    def sites(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> Mapping[str, nn.Module]:
        """Every linear map in the chosen layers that `target_modules` matches."""
        linears = find_linears(layers, self.target_modules)
        if not linears:
            raise ValueError(
                f"There is no linear map in the chosen layers ({', '.join(list(layers)[:5])}, ...) for LoRA deltas to "
                'act on. Use auxiliary="steering", auxiliary="weights", or other layers.'
            )
        self._model, self._linears = model, linears
        return linears

    def detach(self, model: nn.Module) -> None:
        """Forget the model's linear maps; those of another one that was attached since are kept."""
        if self._model is model:
            self._model, self._linears, self._adapters = None, {}, {}

    def start(self, call: Call, generator: torch.Generator) -> Components:
        """A as LoRA initialises it, uniform in +-1/sqrt(in), and B = 0."""
        n_in, n_out = linear_sizes(call.module) or (0, 0)
        x, y = call.x, call.y
        if x is None or x.shape[-1] != n_in or y.shape[-1] != n_out:
            raise ValueError(
                f"{call.name} says that it maps {n_in} to {n_out} features, but it was called with "
                f"{'no tensor' if x is None else list(x.shape)} and returned {list(y.shape)}. Leave it out with "
                "LoRADeltas(target_modules=...)."
            )
        return self._no_change(n_in, n_out, y, generator)

    def _no_change(self, n_in: int, n_out: int, like: Tensor, generator: torch.Generator) -> Components:
        a = torch.empty(self.rank, n_in, dtype=master_dtype(like), device=like.device)
        bound = 1 / math.sqrt(n_in)
        a = replicated(a.uniform_(-bound, bound, generator=generator), like)
        return a, like.new_zeros(n_out, self.rank, dtype=a.dtype)

    def apply(self, components: Components, call: Call) -> Tensor:
        """The output y' = y + s B A x."""
        a, b = (component.to(call.y.dtype) for component in components)
        z = _input_rows(call) @ a.t()  # [positions, rank]
        changed = torch.addmm(rows(call.y), z, b.t(), alpha=self.scale)
        return changed.view(call.y.shape)

    def gradient_rule(self, components: Components, call: Call) -> GradientRule:
        """dl/dB = s (dl/dy)^T z, where only the thin z = A x is kept until the backward pass."""
        a, b = components
        with torch.no_grad():
            x = _input_rows(call)
            # Transposed, [rank, positions], as are the products below: several times faster on CPUs.
            z = a.to(x.dtype) @ x.t()

        def rule(grad_y: Tensor) -> Sequence[Tensor | None]:
            gradient = z.to(grad_y.dtype) @ rows(grad_y)  # [rank, out]
            return None, gradient.t().to(b.dtype) * self.scale

        return rule

    def reset(self, generators: Generators) -> None:
        """Forget components and gradients, and look for adapters to fold deltas into."""
        super().reset(generators)
        self._later = {}
        found = {name: adapters.plain_lora(module) for name, module in self._linears.items()} if self.may_fold else {}
        self._adapters = {name: adapter for name, adapter in found.items() if adapter is not None}

    def pass1_patches(self) -> Iterable[Patch]:
        """Layers whose adapters the deltas are folded into, with B as a leaf."""
        return self._folds(observed=True)

    def pass2_patches(self) -> Iterable[Patch]:
        """Layers whose adapters the deltas are folded into."""
        return self._folds(observed=False)

    def temporary_leaves(self) -> list[Tensor]:
        """Every B that was folded in."""
        return [component for component in self.leaves() if component.requires_grad]

    def collect_later(self) -> None:
        """Every B that was folded in is a leaf of the caller's graph, too."""
        self._later = {name: components[1] for name, components in self._components.items()}

    def replace_gradients(self, function: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]) -> None:
        """Replace g, with what the caller's backward has brought to folded components."""
        for name, b in self._later.items():
            if b.requires_grad and b.grad is not None:
                self._collect(name, [None, b.grad])
        self._later = {}
        super().replace_gradients(function)

    def ascend(self, alpha: float) -> Tensor:
        """Eq. 2; from there on no B is a leaf, also those that got no gradient."""
        norm = super().ascend(alpha)
        self._components = {name: tuple(c.detach() for c in cs) for name, cs in self._components.items()}
        return norm

    def _folds(self, *, observed: bool) -> Iterable[Patch]:
        for name, adapter in self._adapters.items():
            site, components = self._linears[name], partial(self._folded, name, adapter, observed)
            yield site, "forward", Fold(site, adapter, components, self.scale)

    def _folded(self, name: str, adapter: PlainLoRA, observed: bool) -> Components:
        if name not in self._components:
            like, generator = adapter.down.weight, self._generators(adapter.down.weight.device)
            with torch.no_grad():
                started = self._no_change(adapter.down.in_features, adapter.up.out_features, like, generator)
            self._components[name] = tuple(c.requires_grad_(self._required) for c in started)
        if observed:
            a, b = self._components[name]
            self._components[name] = a, b.detach().requires_grad_()
        return self._components[name]

    def __repr__(self) -> str:
        return f"LoRADeltas(rank={self.rank}, lora_alpha={self.lora_alpha}, target_modules={self.target_modules!r})"


def _input_rows(call: Call) -> Tensor:
    """The site's input as [positions, in], in the dtype of its output."""
    assert call.x is not None
    return rows(call.x).to(call.y.dtype)
