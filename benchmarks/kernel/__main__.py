"""Measures the distance and brings docs/kernel.md up to date; to be run in benchmarks/.

    python -m kernel                       # CPU, one thread: twin, eager, stacked, foreach, compiled
    python -m kernel --device cuda         # on a GPU: the Triton kernel, and its share of copy bandwidth
    python -m kernel --device cuda --sweep # tile sizes and shares, for the headline shape only
    python -m kernel --host                # only the host's part of a call, launches replaced by nothing
    python -m kernel.page                  # only renders the page from the saved results

The results go to benchmarks/results/kernel_{cpu,gpu,host}.csv, and the plots next to them.
"""

from __future__ import annotations

import argparse
import csv
import platform
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

import torch

from kernel.host import measure_host
from kernel.measure import PASSES, copy_bandwidth, measure, row, sweep
from kernel.page import RESULTS, write_page
from kernel.plot import plot

# layers, tokens, hidden, share of selected tokens (in 8 runs, as responses after prompts)
CPU_SHAPES = [
    (32, 16, 64, 1.0),
    (8, 1024, 256, 1.0),
    (8, 1024, 256, 0.5),
    (4, 2048, 1024, 1.0),
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


def save(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def measured(device: str, rounds: int, shapes: int | None) -> list[dict[str, Any]]:
    """The rows of the result file; each shape is printed as it comes in."""
    about = environment(device)
    bandwidth = copy_bandwidth(device) if device != "cpu" else None
    rows = []
    for shape in (CPU_SHAPES if device == "cpu" else GPU_SHAPES)[:shapes]:
        for dtype in (torch.float32, torch.bfloat16):
            times, memory = measure(shape, dtype, device, rounds)
            for name, modes in times.items():
                for mode, spent in modes.items():
                    line = row(shape, dtype, name, mode, spent)
                    line["extra_bytes"] = memory[name] if mode == "both" else ""
                    moved = PASSES[mode] * shape[0] * shape[1] * shape[2] * dtype.itemsize
                    counts = bandwidth and name == "triton" and shape[3] == 1.0
                    line["share_of_copy"] = round(moved / line["median_us"] * 1e6 / bandwidth, 3) if counts else ""
                    rows.append(line | about)
            both = {line["provider"]: line["median_us"] for line in rows[-3 * len(times) :] if line["mode"] == "both"}
            print(shape, str(dtype), both, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--shapes", type=int, default=None, help="only the first so many shapes")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--host", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    if arguments.sweep:
        sweep(arguments.rounds)
        return
    if arguments.host:
        about = environment("cpu")
        save(arguments.output / "kernel_host.csv", [line | about for line in measure_host()])
    else:
        kind = "cpu" if arguments.device == "cpu" else "gpu"
        target = arguments.output / f"kernel_{kind}.csv"
        save(target, measured(arguments.device, arguments.rounds, arguments.shapes))
        plot(target, target.with_suffix(".png"))
    if arguments.output == RESULTS:
        write_page()


if __name__ == "__main__":
    main()
