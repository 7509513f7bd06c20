"""Times and memory of the providers.

Providers run interleaved, round after round, and each round's order is rotated, so that a busy machine or a changing
clock hits all of them alike. On the CPU the clock is the thread's own time (one thread), so waiting for other processes
does not count.
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

from kernel.providers import providers

# Bytes that the Triton kernel moves per element and byte of the dtype, counted from its loads and stores.
PASSES = {"forward": 2, "backward": 3, "both": 5}

Shape = tuple[int, int, int, float]  # layers, tokens, hidden, share of selected tokens


class Clock:
    """Time of a call in seconds."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device != "cpu"
        if self.on_gpu:
            self.flush = torch.empty(256 << 20, dtype=torch.uint8, device=device)  # larger than any L2
            self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def __call__(self, function: Callable[[], Any]) -> tuple[float, Any]:
        if self.on_gpu:
            self.flush.zero_()
            self.events[0].record()
            result = function()
            self.events[1].record()
            torch.cuda.synchronize()
            return self.events[0].elapsed_time(self.events[1]) / 1e3, result
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
    shape: Shape, dtype: torch.dtype, device: str, rounds: int
) -> tuple[dict[str, dict[str, list[float]]], dict[str, int | None]]:
    """{provider: {mode: times}} and {provider: bytes}."""
    clock = Clock(device)
    clean, perturbed = states(shape, dtype, device)
    index = selection(shape, device)
    candidates = providers(device)
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
    memory = {name: extra_memory(candidates[name], clean, perturbed, index, device) for name in names}
    return times, memory


def extra_memory(
    provider: Any, clean: list[Tensor], perturbed: list[Tensor], index: Tensor | None, device: str
) -> int | None:
    """Peak bytes above the inputs during forward and backward, less the gradients themselves."""

    def step() -> int:
        found = torch.autograd.grad(provider(clean, perturbed, index), perturbed)
        return sum(g.numel() * g.element_size() for g in found)

    if device != "cpu":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        written = step()
        return torch.cuda.max_memory_allocated() - before - written
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


def copy_bandwidth(device: str) -> float:
    """Bytes per second that a device-to-device copy reads and writes."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    clock = Clock(device)
    return 2 * source.numel() / median(clock(lambda: target.copy_(source))[0] for _ in range(20))


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


def sweep(rounds: int) -> None:
    """Tile sizes, warps and shares of the Triton kernel at the headline shape."""
    from lfu_reg.distances.kernels import triton_launch

    shape, clock = (32, 2048, 4096, 1.0), Clock("cuda")
    clean, perturbed = states(shape, torch.bfloat16, "cuda")
    loss_of = providers("cuda")["triton"]
    for tile in (2048, 4096, 8192):
        for warps in (4, 8):
            for share in (1, 2, 4, 8, 16):
                triton_launch.TILE, triton_launch.WARPS = tile, warps
                triton_launch.SHARE_FORWARD = triton_launch.SHARE_BACKWARD = share
                forward, backward = [], []
                for _ in range(rounds):
                    spent, loss = clock(lambda: loss_of(clean, perturbed, None))
                    forward.append(spent)
                    backward.append(clock(lambda loss=loss: torch.autograd.grad(loss, perturbed))[0])
                f, b = median(forward[2:]) * 1e6, median(backward[2:]) * 1e6
                print(f"tile {tile} warps {warps} share {share}: forward {f:.0f} us, backward {b:.0f} us")
