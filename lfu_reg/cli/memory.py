"""Memory that there is, and a refusal before anything is allocated where a step needs more."""

from __future__ import annotations

from pathlib import Path

import torch

from lfu_reg.cli.errors import Unusable
from lfu_reg.cli.flops import Counts

GIGABYTE = 1e9


def available_bytes(device: str) -> int | None:
    """Free memory of a device; None where it cannot be told."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in lines else None


def check_memory(counts: Counts, device: str, available: int | None) -> None:
    """Raise unless a step fits.

    Raises:
        Unusable: with what is needed, what there is, and what helps.
    """
    if available is None or counts.bytes_needed <= available:
        return
    raise Unusable(
        f"A step of this model needs about {counts.bytes_needed / GIGABYTE:.1f} GB on {device} (weights "
        f"{counts.parameter_bytes / GIGABYTE:.1f} GB, gradients {3 * counts.gradient_bytes / GIGABYTE:.1f} GB, "
        f"activations {counts.saved_bytes / GIGABYTE:.1f} GB), and "
        f"{available / GIGABYTE:.1f} GB are free. Nothing was allocated. Use --layers N for an estimate from a "
        "truncated model, a smaller --batch or --tokens, --checkpointing, --dtype bfloat16 or --tuning lora."
    )
