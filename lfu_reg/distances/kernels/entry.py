"""Masked mean squared difference between K pairs of hidden states: one call for all layers.

    d_l  = 1/(N_l H_l) * sum over the N_l selected positions and the H_l hidden units of (h'_l - h_l)^2
    loss = 1/K sum_l d_l

On CUDA and ROCm a Triton kernel computes it, one launch forward and one backward for each device and pair of dtypes
(`triton_launch`); anywhere else plain torch operations do (`torch_twin`). Triton is imported only where it is used.
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

from lfu_reg.distances.kernels import trial
from lfu_reg.distances.kernels.autograd import Implementation, apply
from lfu_reg.distances.kernels.problem import Problem, describe_problems
from lfu_reg.distances.kernels.torch_twin import TWIN

Reduction: TypeAlias = Literal["mean", "sum"]
Impl: TypeAlias = Literal["auto", "torch", "triton"]

_EXTRA = "pip install 'lfu_reg[triton]'"
_READABLE = (torch.float16, torch.bfloat16, torch.float32)


def mse_over_layers(
    clean: Sequence[Tensor],
    perturbed: Sequence[Tensor],
    token_index: Tensor | Sequence[Tensor | None] | None,
    *,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Mean over layers of the squared difference at the selected positions.

    Args:
        clean: K tensors [..., hidden_l]; the leading dimensions are flattened to positions. Layers may differ in
            positions, hidden size, dtype and device, and the two tensors of a layer in dtype and strides. Whichever
            of the tensors requires a gradient gets one.
        perturbed: K tensors, each of the shape and on the device of its clean partner.
        token_index: positions that count: None for all, one int64 tensor [N] for every layer, or a sequence of K
            such tensors or None. Each position at most once. An index outside of the layer raises in torch
            operations; the Triton kernel, which must not make the host wait, reads nothing there and turns that
            layer's value and the loss into NaN.
        reduction: "mean" divides by positions and hidden size, "sum" by positions only.
        impl: "torch", "triton", or "auto": triton for float16, bfloat16 and float32 tensors on CUDA and ROCm when the
            package is there and a trial on a tiny problem succeeds, torch otherwise.

    Returns:
        The scalar loss, differentiable once, and the detached d_l [K]; float32, or float64 if any layer is float64;
        on the device of the first layer. A layer with nothing selected gives exactly 0.

    Raises:
        TypeError: for integer tensors, or a token index that is not int64.
        ValueError: for lists or shapes that do not fit each other, an unknown option, or impl="triton" where
            that cannot run.
    """
    if impl not in get_args(Impl):
        raise ValueError(f"impl={impl!r}; allowed are {', '.join(map(repr, get_args(Impl)))}.")
    problems = describe_problems(clean, perturbed, token_index, reduction)
    parts = []
    for problem in problems:
        h, h_prime = [clean[i] for i in problem.layers], [perturbed[i] for i in problem.layers]
        parts.append(apply(problem, _choose(problem, impl), h, h_prime))
    per_layer = parts[0] if len(parts) == 1 else _in_order(problems, parts)
    return per_layer.mean(), per_layer.detach()


def _in_order(problems: Sequence[Problem], parts: Sequence[Tensor]) -> Tensor:
    """The distances of several problems in the order of the layers, on the first layer's device."""
    home = problems[0].device
    dtype = torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32
    values: dict[int, Tensor] = {}
    for problem, part in zip(problems, parts, strict=True):
        values |= zip(problem.layers, part.to(home, dtype).unbind(), strict=True)
    return torch.stack([values[layer] for layer in range(len(values))])


def _choose(problem: Problem, impl: str) -> Implementation:
    if not _use_triton(problem, impl):
        return TWIN
    triton = _triton()
    # Whoever insists on the kernel is told what goes wrong.
    return triton if impl == "triton" or trial.passes(triton, problem) else TWIN


def _use_triton(problem: Problem, impl: str) -> bool:
    """Whether the kernel is asked for and can read the tensors.

    Raises:
        ValueError: for impl="triton" where the kernel cannot run.
    """
    if impl == "torch":
        return False
    on_gpu = problem.device.type == "cuda"  # ROCm builds of torch call their devices "cuda" as well
    unreadable = [dtype for dtype in problem.dtypes if dtype not in _READABLE]
    if impl == "auto":
        return on_gpu and not unreadable and _triton_installed()
    if not _triton_installed():
        raise ValueError(f"impl='triton' needs the triton package: {_EXTRA}, or use impl='torch'.")
    if unreadable:
        raise ValueError(
            f"impl='triton' reads float16, bfloat16 and float32, not {unreadable[0]}; use impl='auto' or impl='torch'."
        )
    # Triton's interpreter runs kernels on CPU tensors, which is how they are tested without a GPU.
    if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"impl='triton' needs tensors on a CUDA or ROCm device, not on {problem.device} "
            f"({_EXTRA} brings the package, not the device); use impl='auto' or impl='torch'."
        )
    return True


def _triton() -> Implementation:
    # Imported by name, so that triton is not imported before it is needed.
    found: Implementation = importlib.import_module("lfu_reg.distances.kernels.triton_launch").TRITON
    return found


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
