"""What measured figures depend on besides the setting."""

from __future__ import annotations

import platform
import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import lfu_reg


def surroundings(device: str) -> dict[str, str]:
    """Hardware, versions, commit and date."""
    return {
        "date": date.today().isoformat(),
        "commit": _commit(),
        "lfu_reg": lfu_reg.__version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "transformers", "peft")},
        "hardware": torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor(),
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()


def _commit() -> str:
    folder = Path(lfu_reg.__file__).parent
    try:
        found = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return found.stdout.strip()
