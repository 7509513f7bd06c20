"""The squared difference over layers against its opponents: time, memory, and bandwidth on a GPU.

    python benchmarks/kernel.py                       # CPU, one thread: twin, native, eager, stacked, foreach, compiled
    python benchmarks/kernel.py --device cuda         # on a GPU: the Triton kernel, and its share of copy bandwidth
    python benchmarks/kernel.py --device cuda --sweep # tile sizes and shares, for the headline shape only
    python benchmarks/kernel.py --host                # only the host's part of a call, launches replaced by nothing
    python benchmarks/kernel.py --plot                # only draws the saved results

The results go to benchmarks/results/kernel_{cpu,gpu}.csv and .png, from which docs/kernel.md gets its tables
(`kernel_page.py`).

Providers run interleaved, round after round, and each round's order is rotated, so that a busy machine or a changing
clock hits all of them alike; the CSV has the median and the 20th and 80th percentile. On the CPU the clock is the
thread's own time (one thread), so waiting for other processes does not count.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import platform
import subprocess
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from kernel_host import measure_host
from kernel_page import write_page
from kernel_plot import plot
from kernel_providers import leads, providers
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
# layers, tokens, hidden, share of selected tokens (in 8 runs, as responses after prompts)
CPU_SHAPES = [
    (32, 16, 64, 1.0),
    (32, 128, 256, 1.0),
    (8, 1024, 256, 1.0),
    (8, 1024, 256, 0.5),
    (4, 2048, 1024, 1.0),
    (4, 2048, 1024, 0.5),
    (2, 2048, 4096, 1.0),
]
GPU_SHAPES = [
    (32, 16, 64, 1.0),
    (32, 512, 1024, 1.0),
    (32, 2048, 4096, 1.0),  # the headline: 4x512 tokens
    (32, 2048, 4096, 0.5),
    (80, 2048, 8192, 1.0),
    (32, 2048, 1271, 1.0),
]
# Bytes that the Triton kernel moves per element and byte of the dtype, counted from its loads and stores.
PASSES = {"forward": 2, "backward": 3, "both": 5}


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


def states(shape: tuple[int, int, int, float], dtype: torch.dtype, device: str) -> tuple[list[Tensor], list[Tensor]]:
    count, tokens, hidden, _ = shape
    clean = [torch.randn(tokens, hidden, device=device).to(dtype) for _ in range(count)]
    return clean, [(h + 0.1 * torch.randn_like(h)).requires_grad_() for h in clean]


def selection(shape: tuple[int, int, int, float], device: str) -> Tensor | None:
    _, tokens, _, share = shape
    if share == 1.0:
        return None
    run = tokens // 8
    return torch.arange(tokens, device=device).view(8, run)[:, run - int(share * run) :].reshape(-1)


def measure(shape: tuple[int, int, int, float], dtype: torch.dtype, device: str, rounds: int) -> dict[str, Any]:
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
    return {"times": times, "memory": memory}


def extra_memory(
    provider: Any, clean: list[Tensor], perturbed: list[Tensor], index: Tensor | None, device: str
) -> int | None:
    """Peak bytes above the inputs during forward and backward, less the gradients themselves where they are new."""

    def step() -> int:
        found = torch.autograd.grad(provider(clean, perturbed, index), perturbed)
        inputs = {h.data_ptr() for h in clean}
        return sum(g.numel() * g.element_size() for g in found if g.data_ptr() not in inputs)

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


def measure_leads(shape: tuple[int, int, int, float], dtype: torch.dtype, rounds: int) -> dict[str, dict[str, Any]]:
    """Forward, and a backward in which another gradient flows through the same states."""
    clock = Clock("cpu")
    clean, sources = states(shape, dtype, "cpu")
    flowing = [torch.randn_like(h) for h in clean]
    candidates = leads()
    times: dict[str, dict[str, list[float]]] = {name: {mode: [] for mode in PASSES} for name in candidates}
    names = list(candidates)
    for round_ in range(-2, rounds):
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            perturbed = [x.view_as(x) for x in sources]
            forward, (loss, outputs) = clock(lambda name=name, given=perturbed: candidates[name](clean, given))
            roots, given = [loss, *outputs], [torch.ones_like(loss), *flowing]
            backward, found = clock(lambda roots=roots, given=given: torch.autograd.grad(roots, sources, given))
            del loss, outputs, found, roots
            if round_ >= 0:
                for mode, spent in (("forward", forward), ("backward", backward), ("both", forward + backward)):
                    times[name][mode].append(spent)
    return times


def copy_bandwidth(device: str) -> float:
    """Bytes per second that a device-to-device copy reads and writes."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    clock = Clock(device)
    return 2 * source.numel() / median(clock(lambda: target.copy_(source))[0] for _ in range(20))


def environment(device: str) -> dict[str, str]:
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = ""
    name = torch.cuda.get_device_name() if device != "cpu" else f"{_cpu_name()}, {torch.get_num_threads()} thread"
    return {
        "device": name,
        "torch": torch.__version__,
        "triton": triton_version,
        "commit": git.stdout.strip(),
        "date": date.today().isoformat(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":")[1].strip() if names else platform.processor()


def row(shape: tuple[int, int, int, float], dtype: torch.dtype, name: str, mode: str, spent: list[float]) -> dict:
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
    from lfu_reg.distances.kernels import mse_layout, mse_rows

    shape, clock = (32, 2048, 4096, 1.0), Clock("cuda")
    clean, perturbed = states(shape, torch.bfloat16, "cuda")
    loss_of = providers("cuda")["triton"]
    for tile in (2048, 4096, 8192):
        for warps in (4, 8):
            for share in (1, 2, 4, 8, 16):
                mse_layout.TILE = tile
                mse_layout.WARPS = warps
                mse_rows.lay_out.cache_clear()
                mse_layout.SHARE_FORWARD = mse_layout.SHARE_BACKWARD = share
                forward, backward = [], []
                for _ in range(rounds):
                    spent, loss = clock(lambda: loss_of(clean, perturbed, None))
                    forward.append(spent)
                    backward.append(clock(lambda loss=loss: torch.autograd.grad(loss, perturbed))[0])
                f, b = median(forward[2:]) * 1e6, median(backward[2:]) * 1e6
                print(f"tile {tile} warps {warps} share {share}: forward {f:.0f} us, backward {b:.0f} us")


def save(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--shapes", type=int, default=None, help="only the first so many shapes")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--host", action="store_true")
    parser.add_argument("--plot", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    device = arguments.device
    if arguments.sweep:
        sweep(arguments.rounds)
        return
    kind = "cpu" if device == "cpu" else "gpu"
    if arguments.host:
        torch.set_num_threads(1)
        about = environment("cpu")
        save(arguments.output / "kernel_host.csv", [line | about for line in measure_host()])
        write_page()
        return
    if not arguments.plot:
        if device == "cpu":
            torch.set_num_threads(1)
        about = environment(device)
        bandwidth = copy_bandwidth(device) if device != "cpu" else None
        rows, lead_rows = [], []
        shapes = (CPU_SHAPES if device == "cpu" else GPU_SHAPES)[: arguments.shapes]
        for shape in shapes:
            for dtype in (torch.float32, torch.bfloat16):
                found = measure(shape, dtype, device, arguments.rounds)
                for name, modes in found["times"].items():
                    for mode, spent in modes.items():
                        line = row(shape, dtype, name, mode, spent)
                        line["extra_bytes"] = found["memory"][name] if mode == "both" else ""
                        moved = PASSES[mode] * shape[0] * shape[1] * shape[2] * dtype.itemsize
                        counts = bandwidth and name == "triton" and shape[3] == 1.0
                        line["share_of_copy"] = round(moved / median(spent) / bandwidth, 3) if counts else ""
                        rows.append(line | about)
                both = {name: median(modes["both"]) * 1e6 for name, modes in found["times"].items()}
                print(shape, str(dtype), {name: round(us) for name, us in both.items()}, flush=True)
                if device == "cpu" and shape[3] == 1.0:
                    for name, modes in measure_leads(shape, dtype, arguments.rounds).items():
                        lead_rows += [row(shape, dtype, name, mode, spent) | about for mode, spent in modes.items()]
        save(arguments.output / f"kernel_{kind}.csv", rows)
        if lead_rows:
            save(arguments.output / "kernel_leads_cpu.csv", lead_rows)
    plot(arguments.output / f"kernel_{kind}.csv", arguments.output / f"kernel_{kind}.png")
    write_page()


if __name__ == "__main__":
    main()
