"""LoRA deltas: a low-rank term beside every linear map of the chosen layers.

            ┌────────── W ──────────┐
        x ──┤                       (+)──► y' = W x + s B A x
            └── A ──► z = A x ── B ─┘         A: [rank, in]   B: [out, rank]   s = lora_alpha / rank

A is drawn anew at every step and B starts at zero, so y' = y, dl/dA = 0 and dl/dB = s (dl/dy)^T z: the ascent moves B.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lfu_reg.auxiliaries.base import Call, Components, GradientRule, master_dtype
from lfu_reg.auxiliaries.output import OutputAuxiliary
from lfu_reg.distributed.tensor_parallel import replicated
from lfu_reg.model.linears import TargetModules, find_linears, linear_sizes
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
        return linears

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
        a = torch.empty(self.rank, n_in, dtype=master_dtype(y), device=y.device)
        bound = 1 / math.sqrt(n_in)
        a = replicated(a.uniform_(-bound, bound, generator=generator), y)
        return a, y.new_zeros(n_out, self.rank, dtype=a.dtype)

    def apply(self, components: Components, call: Call) -> Tensor:
        """The output y' = y + s B A x."""
        a, b = (component.to(call.y.dtype) for component in components)
        changed = torch.addmm(rows(call.y), _thin(a, call).t(), b.t(), alpha=self.scale)
        return changed.view(call.y.shape)

    def gradient_rule(self, components: Components, call: Call) -> GradientRule:
        """dl/dB = s (dl/dy)^T z, where only the thin z = A x is kept until the backward pass."""
        a, b = components
        with torch.no_grad():
            z = _thin(a, call)

        def rule(grad_y: Tensor) -> Sequence[Tensor | None]:
            gradient = z.to(grad_y.dtype) @ rows(grad_y)  # [rank, out]
            return None, gradient.t().to(b.dtype) * self.scale

        return rule

    def __repr__(self) -> str:
        return f"LoRADeltas(rank={self.rank}, lora_alpha={self.lora_alpha}, target_modules={self.target_modules!r})"


def _thin(a: Tensor, call: Call) -> Tensor:
    """The product z = A x as [rank, positions]: transposed, it and what comes of it are much faster on CPUs."""
    assert call.x is not None
    return a.to(call.y.dtype) @ rows(call.x).to(call.y.dtype).t()
