"""Measures the distance and brings docs/kernel.md up to date; to be run in benchmarks/.

    python -m kernel                       # CPU, one thread: twin, eager, stacked, foreach, compiled
    python -m kernel --host                # only the host's part of a call, launches replaced by nothing
    python -m kernel.page                  # only renders the page from the saved results

The results go to benchmarks/results/kernel_{cpu,host}.csv, and a plot next to the first. A GPU has `python -m gpu`.
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
from kernel.measure import measure, resident_peak, row, thread_time
from kernel.page import RESULTS, write_page
from kernel.plot import plot
from kernel.providers import providers

# layers, tokens, hidden, share of selected tokens (in 8 runs, as responses after prompts)
SHAPES = [
    (32, 16, 64, 1.0),
    (8, 1024, 256, 1.0),
    (8, 1024, 256, 0.5),
    (4, 2048, 1024, 1.0),
    (2, 2048, 4096, 1.0),
]


def environment() -> dict[str, str]:
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = ""
    return {
        "device": f"{_cpu_name()}, {torch.get_num_threads()} thread",
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


def measured(rounds: int, shapes: int | None) -> list[dict[str, Any]]:
    """The rows of the result file; each shape is printed as it comes in."""
    about = environment()
    rows = []
    for shape in SHAPES[:shapes]:
        for dtype in (torch.float32, torch.bfloat16):
            times, memory = measure(providers(), shape, dtype, "cpu", rounds, thread_time, resident_peak)
            for name, modes in times.items():
                for mode, spent in modes.items():
                    line = row(shape, dtype, name, mode, spent)
                    line["extra_bytes"] = memory[name] if mode == "both" else ""
                    rows.append(line | about)
            both = {line["provider"]: line["median_us"] for line in rows[-3 * len(times) :] if line["mode"] == "both"}
            print(shape, str(dtype), both, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--shapes", type=int, default=None, help="only the first so many shapes")
    parser.add_argument("--host", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.host:
        about = environment()
        save(arguments.output / "kernel_host.csv", [line | about for line in measure_host()])
    else:
        target = arguments.output / "kernel_cpu.csv"
        save(target, measured(arguments.rounds, arguments.shapes))
        plot(target, target.with_suffix(".png"))
    if arguments.output == RESULTS:
        write_page()


if __name__ == "__main__":
    main()
