"""Whether a kernel works on a device: tried on a tiny problem against the torch twin, before it is trusted.

A kernel can fail where the library cannot know in advance: no C compiler for Triton's launcher, releases of torch and
triton that do not fit each other, a GPU too old for bfloat16, a bug of the compiler. Training goes on without it then.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from lfu_reg.diagnostics import LfUWarning
from lfu_reg.distances.kernels import mse_torch
from lfu_reg.distances.kernels.mse_problem import Problem, describe_problems

Run = Callable[[Problem], tuple[Tensor, Tensor]]
# What a trial is about: kernel, device, pairs of dtypes, and whether there are token indices.
_Case = tuple[str, torch.device, tuple[tuple[torch.dtype, torch.dtype], ...], bool]

_verdicts: dict[_Case, bool] = {}


def passes(name: str, run: Run, problem: Problem) -> bool:
    """Whether the kernel solves problems like this one; tells once, as `LfUWarning`, if it does not.

    Args:
        name: of the kernel, for the warning.
        run: solves a problem with it.
        problem: is looked at only.

    Raises:
        torch.OutOfMemoryError: if the device has no room for the trial, which says nothing about the kernel.
    """
    pairs = tuple(dict.fromkeys((clean, perturbed) for _, clean, perturbed in problem.kinds.looks))
    case = (name, problem.device, pairs, any(index is not None for index in problem.index))
    verdict = _verdicts.get(case)
    if verdict is None:
        reason = _what_is_wrong(run, case)
        verdict = _verdicts[case] = reason is None
        if reason is not None:
            warnings.warn(_message(name, problem.device, reason), LfUWarning, stacklevel=4)
    return verdict


def _what_is_wrong(run: Run, case: _Case) -> str | None:
    with torch.inference_mode(False), torch.enable_grad():
        expected = _solve(mse_torch.run, case)
        try:
            found = _solve(run, case)
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


def _solve(run: Run, case: _Case) -> list[Tensor]:
    """Loss, distances and gradients of two layers for each pair of dtypes; draws no random numbers."""
    _, device, pairs, has_index = case
    wave = torch.arange(2 * 5 * 128, dtype=torch.float64, device=device).view(2, 5, 128).sin()
    clean, perturbed = [], []
    for dtype, dtype_perturbed in pairs:
        for layer in (1, 2):
            clean.append((layer * wave).to(dtype))
            perturbed.append((layer * wave + 0.25 * (3 * wave).cos()).to(dtype_perturbed).requires_grad_())
    index = torch.arange(1, 9, 2, device=device) if has_index else None
    (problem,) = describe_problems(clean, perturbed, index, None, "mean", "clean", False)
    loss, per_layer = run(problem)
    return [loss.detach(), per_layer, *torch.autograd.grad(loss, perturbed)]


def _message(name: str, device: torch.device, reason: str) -> str:
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return (
        f"lfu_reg's {name} kernel does not work on {device}: {reason}. Plain torch operations are used from now on; "
        "results are the same, only slower. Usual cures: a C/C++ compiler on the PATH, and releases of torch and "
        f"triton that belong together (here torch {torch.__version__}, triton {triton}). "
        "distance=MSE(impl='torch') silences this; please report it if it stays."
    )


def _first_lines(error: Exception) -> str:
    output = getattr(error, "stderr", None)  # of a compiler
    text = output.decode(errors="replace") if isinstance(output, bytes) and output else str(error)
    return " ".join(text.split())[:300]
