"""Masked mean squared difference between K pairs of hidden states: one call for all layers.

    d_l  = 1/(N_l H_l) * sum over the N_l selected positions and the H_l hidden units of (h'_l - h_l)^2
    loss = sum_l w_l d_l                                   (w_l = 1/K unless given)

On CUDA and ROCm a Triton kernel does it in one launch forward and one backward (`mse_triton`), anywhere else
plain torch operations do (`mse_torch`), or on request a C++ kernel (`mse_native`). This file imports torch only.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from lfu_reg.distances.kernels import mse_native, mse_torch, mse_trial
from lfu_reg.distances.kernels.mse_problem import Problem, describe_problems

Reduction: TypeAlias = Literal["mean", "sum"]
StopGradient: TypeAlias = Literal["clean", "perturbed", "none"]
Impl: TypeAlias = Literal["auto", "torch", "triton", "native"]

_EXTRA = "pip install 'lfu_reg[triton]'"


def mse_over_layers(
    clean: Sequence[Tensor],
    perturbed: Sequence[Tensor],
    token_index: Tensor | Sequence[Tensor | None] | None,
    weights: Tensor | Sequence[float] | None = None,
    *,
    reduction: Reduction = "mean",
    stop_gradient: StopGradient = "clean",
    impl: Impl = "auto",
    overwrite_clean: bool = False,
) -> tuple[Tensor, Tensor]:
    """Weighted sum over layers of the squared difference at the selected positions.

    Args:
        clean: K tensors [..., hidden_l]; the leading dimensions are flattened to positions. Layers may differ in
            positions, hidden size, dtype and device, and the two tensors of a layer in dtype and strides.
        perturbed: K tensors, each of the shape and on the device of its clean partner.
        token_index: positions that count: None for all, one int64 tensor [N] for every layer, or a sequence of K
            such tensors or None. Each position at most once. An index outside of the layer raises on the CPU; on a
            GPU, where looking would stall the stream, it reads nothing and turns that layer's value and the loss
            into NaN.
        weights: K factors w_l, a floating-point tensor [K] or numbers, used as given; None means 1/K each. They are
            constants: no gradient flows to them.
        reduction: "mean" divides by positions and hidden size, "sum" by positions only.
        stop_gradient: the side that gets no gradient: "clean" (default), "perturbed", or "none".
        impl: "torch", "triton", "native", or "auto": triton for float16, bfloat16 and float32 tensors on CUDA and
            ROCm when the package is there and a trial on a tiny problem succeeds, torch otherwise. "native" is, for
            tensors on the CPU, a C++ kernel that the system's compiler makes at its first use, and "auto" elsewhere.
        overwrite_clean: allows writing h' - h over the `clean` tensors and handing them out as gradients of
            `perturbed`, so that no gradient memory is allocated. Only for tensors that nobody else reads any more;
            afterwards their values are undefined and the loss can be backpropagated once. Layers where it is not
            possible (see `mse_problem.overwritable`) are treated as without it. In half precision h' - h is then
            rounded to that precision before it is scaled.

    Returns:
        The scalar loss, differentiable once, and the detached unweighted d_l [K]; float32, or float64 if any
        layer is float64; on the device of the first layer. A layer with nothing selected gives exactly 0.

    Raises:
        TypeError: for integer tensors, or a token index that is not int64.
        ValueError: for lists or shapes that do not fit each other, an unknown option, or impl="triton" where
            that cannot run.
    """
    problems = describe_problems(clean, perturbed, token_index, weights, reduction, stop_gradient, overwrite_clean)
    parts = [_solve(problem, impl) for problem in problems]
    if len(parts) == 1:
        return parts[0]
    # One autograd node per device, so that autograd handles the streams of each.
    home = perturbed[0].device
    dtype = torch.float64 if any(d.dtype == torch.float64 for _, d in parts) else torch.float32
    loss = torch.stack([part.to(home, dtype, non_blocking=True) for part, _ in parts]).sum()
    per_layer = torch.empty(len(perturbed), dtype=dtype, device=home)
    for problem, (_, values) in zip(problems, parts, strict=True):
        where = torch.tensor(problem.layers, device=home)
        per_layer[where] = values.to(home, dtype, non_blocking=True)
    return loss, per_layer


def _solve(problem: Problem, impl: str) -> tuple[Tensor, Tensor]:
    if impl == "native" and problem.device.type == "cpu":
        trusted = mse_trial.passes("C++", mse_native.run, problem)
        return mse_native.run(problem) if trusted else mse_torch.run(problem)
    if not _use_triton(problem, impl):
        return mse_torch.run(problem)
    # Whoever insists on it is told what goes wrong.
    trusted = impl == "triton" or mse_trial.passes("Triton", _by_triton, problem)
    return _by_triton(problem) if trusted else mse_torch.run(problem)


def _by_triton(problem: Problem) -> tuple[Tensor, Tensor]:
    # Imported by name, so that no import of triton happens before it is needed.
    found: tuple[Tensor, Tensor] = importlib.import_module("lfu_reg.distances.kernels.mse_gpu").run(problem)
    return found


def _use_triton(problem: Problem, impl: str) -> bool:
    if impl == "torch":
        return False
    if impl not in get_args(Impl):
        raise ValueError(f"impl={impl!r}; allowed are {', '.join(map(repr, get_args(Impl)))}.")
    on_gpu = problem.device.type == "cuda"  # ROCm builds of torch call their devices "cuda" as well
    has_double = problem.dtype == torch.float64
    if impl != "triton":
        return on_gpu and not has_double and not _other_dtypes(problem) and _triton_installed()
    if not _triton_installed():
        raise ValueError(f"impl='triton' needs the triton package: {_EXTRA}, or use impl='torch'.")
    if has_double:
        raise ValueError("impl='triton' computes in float32; use impl='torch' for float64 tensors.")
    # Triton's interpreter runs kernels on CPU tensors; it is how they are tested without a GPU.
    if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"impl='triton' needs tensors on a CUDA or ROCm device, not on {problem.device} "
            f"({_EXTRA} brings the package, not the device); use impl='auto' or impl='torch'."
        )
    return True


def _other_dtypes(problem: Problem) -> bool:
    known = (torch.float16, torch.bfloat16, torch.float32)
    return any(dtype not in known for _, *dtypes in problem.kinds.looks for dtype in dtypes)


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
