"""Steering vectors: one vector d_l per layer, added to its output (the representation flavour of the paper).

h_l ──(+)──► h'_l = h_l + d_l                        d_l: [hidden], zero at the start of every step
       ▲
      d_l       relative=True:  h'_l = ||h_l|| * u' / ||u'||,  u' = h_l / ||h_l|| + d_l
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from lfu_reg.auxiliaries.base import Call, Components, GradientRule, master_dtype
from lfu_reg.auxiliaries.output import OutputAuxiliary
from lfu_reg.auxiliaries.return_checks import check_unwritten, versions
from lfu_reg.model.names import one_of
from lfu_reg.model.tokens import rows


class SteeringVectors(OutputAuxiliary):
    """One steering vector per chosen layer.

    dl/dd_l is the sum of dl/dh_l over tokens, so pass 1 needs no operation in the forward at all.

    Args:
        relative: keep the norm of every hidden state and turn it only (the authors' code): d_l is then relative to a
            hidden state of length one, which makes alpha comparable between layers and models.
        norm: "global" (Eq. 2: one norm over all layers) or "per-layer" (every d_l gets length alpha).
        tokens: "masked" adds d_l at the tokens that the token mask selects, "all" at every position.
    """

    default_alpha = 0.1
    default_lam = 0.1

    def __init__(
        self,
        *,
        relative: bool = False,
        norm: Literal["global", "per-layer"] = "global",
        tokens: Literal["masked", "all"] = "masked",
    ) -> None:
        super().__init__()
        self.relative = relative
        self.norm = one_of("norm", norm, ("global", "per-layer"))
        self.tokens = one_of("tokens", tokens, ("masked", "all"))

    def sites(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> Mapping[str, nn.Module]:
        """The chosen layers themselves."""
        return layers

    def start(self, call: Call, generator: torch.Generator) -> Components:
        """d_l = 0, [hidden]."""
        return (call.y.new_zeros(call.y.shape[call.tokens.axis], dtype=master_dtype(call.y)),)

    def apply(self, components: Components, call: Call) -> Tensor:
        """h'_l, at the tokens that count."""
        y, tokens = call.y, call.tokens
        shape = [1] * y.dim()
        shape[tokens.axis] = -1
        d = components[0].to(y.dtype).reshape(shape)  # [..., hidden, ...]
        mask = None if self.tokens == "all" or tokens.mask is None else tokens.mask.unsqueeze(tokens.axis)
        if not self.relative:
            return y + d if mask is None else torch.addcmul(y, mask.to(y.dtype), d)
        length = torch.linalg.vector_norm(y, dim=tokens.axis, keepdim=True)
        turned = y / _positive(length) + d
        turned = length * turned / _positive(torch.linalg.vector_norm(turned, dim=tokens.axis, keepdim=True))
        return turned if mask is None else torch.where(mask, turned, y)

    def gradient_rule(self, components: Components, call: Call) -> GradientRule:
        """dl/dd_l: the sum of dl/dh_l over tokens; relative: of ||h|| times its part orthogonal to h."""
        index = None if self.tokens == "all" else call.tokens.index
        axis, dtype = call.tokens.axis, components[0].dtype
        # Neither call.x nor, where it is not read, the hidden state is kept alive.
        kept = replace(call, x=None, y=call.y.detach()) if self.relative else None
        before = versions(None, call.y)

        def rule(grad_y: Tensor) -> Sequence[Tensor]:
            gradient = rows(grad_y, axis, index)  # [tokens, hidden]
            if kept is not None:
                check_unwritten(self._label, kept, before)
                # d/dd of ||h|| * normalise(h/||h|| + d) at d = 0 is ||h|| (I - u u^T), with u = h / ||h||.
                state, gradient = rows(kept.y, axis, index).to(dtype), gradient.to(dtype)
                length = torch.linalg.vector_norm(state, dim=-1, keepdim=True)
                unit = state / _positive(length)
                gradient = length * (gradient - unit * (unit * gradient).sum(-1, keepdim=True))
            return (gradient.sum(0, dtype=dtype),)

        return rule

    def groups(self, names: Sequence[str]) -> Sequence[int] | None:
        """Every layer is a group of its own for norm="per-layer"."""
        return range(len(names)) if self.norm == "per-layer" else None

    def __repr__(self) -> str:
        return f"SteeringVectors(relative={self.relative}, norm={self.norm!r}, tokens={self.tokens!r})"


def _positive(length: Tensor) -> Tensor:
    # A hidden state of zeros has no direction to turn: dividing by one leaves it at zero instead of NaN.
    return torch.where(length > 0, length, torch.ones_like(length))
