"""Whether the Triton kernel works on a device: tried on a tiny problem against the torch twin, before it is trusted.

A kernel can fail where the library cannot know in advance: no C compiler for Triton's launcher, releases of torch and
triton that do not fit each other, a GPU too old for bfloat16, a bug of the compiler. Training goes on without it then.
"""

from __future__ import annotations

import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch
from torch import Tensor

from lfu_reg.diagnostics import LfUWarning
from lfu_reg.distances.kernels.autograd import Implementation, apply
from lfu_reg.distances.kernels.problem import Problem, describe_problems
from lfu_reg.distances.kernels.torch_twin import TWIN


class _Case(NamedTuple):
    """What a trial is about: everything else is the same code on the device."""

    device: torch.device
    dtypes: tuple[torch.dtype, torch.dtype]
    has_index: bool


_verdicts: dict[_Case, bool] = {}


def passes(kernel: Implementation, problem: Problem) -> bool:
    """Whether the kernel solves problems like this one; tells once, as `LfUWarning`, if it does not.

    Raises:
        torch.OutOfMemoryError: if the device has no room for the trial, which says nothing about the kernel.
    """
    case = _Case(problem.device, problem.dtypes, any(index is not None for index in problem.index))
    if case not in _verdicts:
        reason = _what_is_wrong(kernel, case)
        _verdicts[case] = reason is None
        if reason is not None:
            warnings.warn(_message(case.device, reason), LfUWarning, stacklevel=4)
    return _verdicts[case]


def _what_is_wrong(kernel: Implementation, case: _Case) -> str | None:
    with torch.inference_mode(False), torch.enable_grad():
        expected = _solve(TWIN, case)
        try:
            found = _solve(kernel, case)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            return f"it raised {type(error).__name__}: {_first_lines(error)}"
    for one, other in zip(found, expected, strict=True):
        # Sums are float32 in another order; gradients are rounded once.
        tolerance = 4 * torch.finfo(one.dtype).eps + (1e-5 if one.dtype == torch.float32 else 0)
        difference = (one.double() - other.double()).abs().max().item()
        if not difference <= tolerance * other.double().abs().max().item():
            return f"its results are off by {difference:.1e} on a small problem"
    return None


def _solve(implementation: Implementation, case: _Case) -> list[Tensor]:
    """Distances and gradients of two layers; draws no random numbers."""
    wave = torch.arange(2 * 5 * 128, dtype=torch.float64, device=case.device).view(2, 5, 128).sin()
    clean = [(n * wave).to(case.dtypes[0]).requires_grad_() for n in (1, 2)]
    perturbed = [(n * wave + 0.25 * (3 * wave).cos()).to(case.dtypes[1]).requires_grad_() for n in (1, 2)]
    index = torch.arange(1, 9, 2, device=case.device) if case.has_index else None
    (problem,) = describe_problems(clean, perturbed, index, "mean")
    per_layer = apply(problem, implementation, clean, perturbed)
    return [per_layer.detach(), *torch.autograd.grad(per_layer.mean(), [*clean, *perturbed])]


def _message(device: torch.device, reason: str) -> str:
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return (
        f"lfu_reg's Triton kernel does not work on {device}: {reason}. Plain torch operations are used from now on; "
        "results are the same, only slower. Usual cures: a C compiler on the PATH, and releases of torch and "
        f"triton that belong together (here torch {torch.__version__}, triton {triton}). "
        "distance=MSE(impl='torch') silences this; please report it if it stays."
    )


def _first_lines(error: Exception) -> str:
    output = getattr(error, "stderr", None)  # of a compiler
    text = output.decode(errors="replace") if isinstance(output, bytes) and output else str(error)
    return " ".join(text.split())[:300]
