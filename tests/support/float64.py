"""Keep float64 models in float64.

Some transformers modules compute in float32 whatever the model's dtype (norms, routers, scans). Rounding there makes
two mathematically equal computations differ by 1e-8, which would hide real errors. `keep_float64` lets the forward of
the given classes see float64 where it asks for float32; models in other dtypes are not affected.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_PATCHED: set[type[nn.Module]] = set()


class _NoFloat32(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        def widen(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if func is Tensor.float:
            func = Tensor.double
        return func(*map(widen, args), **{k: widen(v) for k, v in (kwargs or {}).items()})


@contextmanager
def everywhere() -> Iterator[None]:
    """Float64 instead of float32 in everything that runs in the block."""
    with _NoFloat32():
        yield


def keep_float64(*classes: type[nn.Module]) -> None:
    """Patch the classes' forward, once per process."""
    for cls in classes:
        if cls not in _PATCHED:
            _PATCHED.add(cls)
            cls.forward = _patched(cls.forward)  # type: ignore[method-assign]


def _patched(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def in_float64(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if next(self.parameters()).dtype is not torch.float64:
            return forward(self, *args, **kwargs)
        with _NoFloat32():
            return forward(self, *args, **kwargs)

    return in_float64
