"""LoRA deltas: a low-rank term beside every linear map of the chosen layers.

            ┌────────── W ──────────┐
        x ──┤                       (+)──► y' = W x + s B A x
            └── A ──► z = A x ── B ─┘         A: [rank, in]   B: [out, rank]   s = lora_alpha / rank

A is random, drawn anew at every step, and B starts at zero, so y' = y. Then dl/dA is exactly zero and dl/dB = s
(dl/dy)^T z: the ascent moves B. With both at zero nothing would ever move.

Pass 2 has two ways to the same y'. The thin products above cost rank * (in + out) per token, forward and backward. The
merged weight W + s B A costs rank * in * out once, and in * out of memory: cheaper where there are many more tokens
than hidden units, which `_pays` decides at each site. Half-precision weights are never merged: rounding eats the delta.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lfu_reg import adapters
from lfu_reg.autocast import without_autocast
from lfu_reg.auxiliaries.base import Call, Components, Generators, GradientRule, master_dtype
from lfu_reg.auxiliaries.output import OutputAuxiliary
from lfu_reg.linears import TargetModules, find_linears, linear_sizes
from lfu_reg.substitution import Replacement
from lfu_reg.tokens import rows


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
        self._merged: dict[str, _Weight] = {}

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
        return a.uniform_(-bound, bound, generator=generator), y.new_zeros(n_out, self.rank, dtype=a.dtype)

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
        """Forget components, gradients, and which sites are merged."""
        super().reset(generators)
        self._merged = {}

    def observe(self, call: Call) -> GradientRule:
        """As any auxiliary does; also decides which way pass 2 goes at this site."""
        # Under FSDP2 the weight that is seen here is a gathered copy, gone and replaced at the next forward.
        weight = _plain_weight(call.module) if self.shards is None and self._pays(call) else None
        if weight is not None and weight.parameter.dtype == call.y.dtype:
            self._merged[call.name] = weight
        return super().observe(call)

    def apply_at(self, call: Call) -> Tensor:
        """As `apply`, or nothing where the delta is in the weight."""
        return call.y if self._in_weights(call.name) else super().apply_at(call)

    def replacements(self) -> Iterable[Replacement]:
        """W + s B A instead of W, at the sites where that is cheaper."""
        return (
            (weight.holder, "weight", self._merge(weight, *self._components[name]))
            for name, weight in self._merged.items()
            if self._in_weights(name)
        )

    def _in_weights(self, name: str) -> bool:
        return name in self._merged and not self._required

    def _merge(self, weight: _Weight, a: Tensor, b: Tensor) -> Tensor:
        parameter = weight.parameter
        left, right = (a.t(), b.t()) if weight.transposed else (b, a)
        with without_autocast(parameter.device.type):
            return torch.addmm(parameter, left, right, alpha=self.scale)

    @staticmethod
    def _pays(call: Call) -> bool:
        if call.x is None or call.y.dtype not in (torch.float32, torch.float64):
            return False
        n_in, n_out = call.x.shape[-1], call.y.shape[-1]
        # So the merged weights take at most a fifth of the memory of the activations around them.
        return 5 * n_in * n_out <= call.y.numel() // max(n_out, 1) * (n_in + n_out)

    def __repr__(self) -> str:
        return f"LoRADeltas(rank={self.rank}, lora_alpha={self.lora_alpha}, target_modules={self.target_modules!r})"


def _input_rows(call: Call) -> Tensor:
    """The site's input as [positions, in], in the dtype of its output."""
    assert call.x is not None
    return rows(call.x).to(call.y.dtype)


@dataclass(frozen=True)
class _Weight:
    """A module whose parameter `weight` is all that its linear map depends on, but for a bias."""

    holder: nn.Module
    transposed: bool

    @property
    def parameter(self) -> nn.Parameter:
        """Looked up when it is needed: another one may be in its place by then."""
        parameter = self.holder._parameters["weight"]
        assert parameter is not None
        return parameter


def _plain_weight(module: nn.Module) -> _Weight | None:
    """The weight into which a delta could be merged; None where it is packed, parametrised, sharded or compiled."""
    holder = adapters.innermost(module)
    if holder is not module and not (adapters.base_layer(module) is holder and adapters.adds_to_its_base_layer(module)):
        return None
    # A forward of the instance's own (accelerate's offloading) may bring another weight.
    if getattr(holder, "_compiled_call_impl", None) is not None or "forward" in vars(holder):
        return None
    transposed = type(holder).__name__ == "Conv1D"
    if not (type(holder) is nn.Linear or transposed) or type(holder._parameters.get("weight")) is not nn.Parameter:
        return None
    return _Weight(holder, transposed)
