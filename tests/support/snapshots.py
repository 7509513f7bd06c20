"""What a step must leave as it was, taken before and compared after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

HOOK_TABLES = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
)


def hook_counts(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """How many hooks of each kind every module has."""
    return {
        name: tuple(len(getattr(module, table, ())) for table in HOOK_TABLES) for name, module in model.named_modules()
    }


def tensor_hook_counts(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Hooks on the parameters themselves."""
    return {
        name: (len(p._backward_hooks or ()), len(getattr(p, "_post_accumulate_grad_hooks", None) or ()))
        for name, p in model.named_parameters()
    }


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def differing(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> list[str]:
    """Names whose tensors are not bit-identical."""
    names = [*left, *(name for name in right if name not in left)]
    return [n for n in names if n not in left or n not in right or not torch.equal(left[n], right[n])]


@dataclass
class Snapshot:
    """Everything about a model that a step has no business to change."""

    hooks: dict[str, Any]
    tensor_hooks: dict[str, Any]
    flags: dict[str, bool]
    training: dict[str, bool]
    parameters: dict[str, tuple[int, Tensor]]
    gradients: dict[str, tuple[int, Tensor] | None]
    attributes: dict[str, set[str]]
    grad_enabled: bool
    default_dtype: torch.dtype

    @classmethod
    def of(cls, model: nn.Module) -> Snapshot:
        return cls(
            hooks=hook_counts(model),
            tensor_hooks=tensor_hook_counts(model),
            flags={name: p.requires_grad for name, p in model.named_parameters()},
            training={name: m.training for name, m in model.named_modules()},
            parameters={name: (id(p), p.detach().clone()) for name, p in model.named_parameters()},
            gradients={
                name: None if p.grad is None else (id(p.grad), p.grad.clone()) for name, p in model.named_parameters()
            },
            attributes={name: set(vars(m)) for name, m in model.named_modules()},
            grad_enabled=torch.is_grad_enabled(),
            default_dtype=torch.get_default_dtype(),
        )

    def check(self, model: nn.Module, *, gradients: bool = True) -> None:
        """Nothing differs; `gradients=False` where a backward has run meanwhile."""
        now = Snapshot.of(model)
        for field in ("hooks", "tensor_hooks", "flags", "training", "attributes", "grad_enabled", "default_dtype"):
            assert getattr(now, field) == getattr(self, field), f"{field} changed"
        assert _same(now.parameters, self.parameters), "parameters changed"
        if gradients:
            assert _same(now.gradients, self.gradients), ".grad changed"


def _same(left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    if left.keys() != right.keys():
        return False
    for name, mine in left.items():
        theirs = right[name]
        if mine is None or theirs is None:
            if mine is not theirs:
                return False
        elif mine[0] != theirs[0] or not torch.equal(mine[1], theirs[1]):
            return False
    return True
