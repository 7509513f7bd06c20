"""The host's part of a call of the Triton kernel: everything but the launches, which are replaced by nothing.

Needs triton but no GPU. Calls are interleaved. Of 60 rounds of 30 calls each, in processor time, the least is what the
code costs, and the median what a busy machine makes of it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

LAYERS, TOKENS, HIDDEN = 32, 64, 64
ROUNDS, CALLS = 60, 30


class Nothing:
    """A kernel whose launch does nothing."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *arguments, **options: None


def measure_host() -> list[dict[str, Any]]:
    """Rows of call, pass, and microseconds."""
    from lfu_reg.distances.kernels import triton_launch
    from lfu_reg.distances.kernels.entry import mse_over_layers

    clean = [torch.randn(TOKENS, HIDDEN).bfloat16() for _ in range(LAYERS)]
    perturbed = [torch.randn(TOKENS, HIDDEN).bfloat16().requires_grad_() for _ in range(LAYERS)]
    index = torch.arange(TOKENS // 2)

    def kernel(chosen: Any) -> Callable[[], Tensor]:
        return lambda: mse_over_layers(clean, perturbed, chosen, impl="triton")[0]

    def eager() -> Tensor:
        return torch.stack([F.mse_loss(p, c) for p, c in zip(perturbed, clean, strict=True)]).mean()

    calls = {"kernel": kernel(None), "kernel, token index": kernel([index] * LAYERS), "eager loop of F.mse_loss": eager}
    both = {name: (lambda call=call: torch.autograd.grad(call(), perturbed)) for name, call in calls.items()}
    times: dict[tuple[str, str], list[float]] = {}
    kernels = dict.fromkeys(("forward_kernel", "backward_kernel"), Nothing())
    # Triton's interpreter is what lets CPU tensors through; nothing is launched.
    with mock.patch.multiple(triton_launch, **kernels), mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        for _ in range(ROUNDS):
            for passes, table in (("forward", calls), ("both", both)):
                for name, call in table.items():
                    call()
                    start = time.thread_time()
                    for _ in range(CALLS):
                        call()
                    times.setdefault((name, passes), []).append((time.thread_time() - start) / CALLS)
    return [
        {
            "layers": LAYERS,
            "call": name,
            "mode": passes,
            "least_us": round(min(spent) * 1e6, 1),
            "median_us": round(median(spent) * 1e6, 1),
        }
        for (name, passes), spent in times.items()
    ]
