"""Times and memory of the providers.

Providers run interleaved, round after round, and each round's order is rotated, so that a busy machine or a changing
clock hits all of them alike. On the CPU the clock is the thread's own time (one thread), so waiting for other processes
does not count; `gpu/kernels.py` brings a GPU's.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from kernel.providers import Provider

# Bytes that the Triton kernel moves per element and byte of the dtype, counted from its loads and stores.
PASSES = {"forward": 2, "backward": 3, "both": 5}

Shape = tuple[int, int, int, float]  # layers, tokens, hidden, share of selected tokens


def thread_time(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a call, and what it returned."""
    start = time.thread_time()
    result = function()
    return time.thread_time() - start, result


def states(shape: Shape, dtype: torch.dtype, device: str) -> tuple[list[Tensor], list[Tensor]]:
    count, tokens, hidden, _ = shape
    clean = [torch.randn(tokens, hidden, device=device).to(dtype) for _ in range(count)]
    return clean, [(h + 0.1 * torch.randn_like(h)).requires_grad_() for h in clean]


def selection(shape: Shape, device: str) -> Tensor | None:
    _, tokens, _, share = shape
    if share == 1.0:
        return None
    run = tokens // 8
    return torch.arange(tokens, device=device).view(8, run)[:, run - int(share * run) :].reshape(-1)


def measure(
    candidates: dict[str, Provider],
    shape: Shape,
    dtype: torch.dtype,
    device: str,
    rounds: int,
    clock: Callable[[Callable[[], Any]], tuple[float, Any]],
    peak: Callable[[Callable[[], int]], int | None],
) -> tuple[dict[str, dict[str, list[float]]], dict[str, int | None]]:
    """{provider: {mode: times}} and {provider: bytes}.

    Args:
        candidates: providers by name.
        shape, dtype: of the states.
        device: of the states.
        rounds: that count.
        clock: seconds of a call, and what it returned.
        peak: bytes above what was there before a call and what it says that it hands out.
    """
    clean, perturbed = states(shape, dtype, device)
    index = selection(shape, device)
    inner = max(1, 200_000 // (shape[0] * shape[1] * shape[2]))
    times: dict[str, dict[str, list[float]]] = {name: {mode: [] for mode in PASSES} for name in candidates}
    names = list(candidates)
    for round_ in range(-2, rounds):  # two rounds to compile and warm up
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            forward = backward = 0.0
            for _ in range(inner):
                spent, loss = clock(lambda name=name: candidates[name](clean, perturbed, index))
                forward += spent
                spent, found = clock(lambda loss=loss: torch.autograd.grad(loss, perturbed))
                backward += spent
                del loss, found
            if round_ >= 0:
                for mode, spent in (("forward", forward), ("backward", backward), ("both", forward + backward)):
                    times[name][mode].append(spent / inner)

    def step(provider: Provider) -> int:
        """Forward and backward; the bytes of the gradients."""
        found = torch.autograd.grad(provider(clean, perturbed, index), perturbed)
        return sum(g.numel() * g.element_size() for g in found)

    return times, {name: peak(lambda name=name: step(candidates[name])) for name in names}


def resident_peak(step: Callable[[], int]) -> int | None:
    """Peak of the process's memory above what it was, less the bytes that the step says it hands out."""
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")  # the peak starts from here
    before = _status("VmRSS")
    written = step()
    return max(0, _status("VmHWM") - before - written)


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) * 1024


def row(shape: Shape, dtype: torch.dtype, name: str, mode: str, spent: list[float]) -> dict:
    layers, tokens, hidden, share = shape
    low, *_, high = quantiles(spent, n=5)
    return {
        "layers": layers,
        "tokens": tokens,
        "hidden": hidden,
        "selected": share,
        "dtype": str(dtype).removeprefix("torch."),
        "provider": name,
        "mode": mode,
        "rounds": len(spent),
        "median_us": round(median(spent) * 1e6, 1),
        "p20_us": round(low * 1e6, 1),
        "p80_us": round(high * 1e6, 1),
    }
