"""What measured figures depend on besides the setting."""

from __future__ import annotations

import platform
import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import lfu_reg


def environment(device: str) -> dict[str, str]:
    """Hardware, versions, commit and date."""
    return {
        "date": date.today().isoformat(),
        "commit": COMMIT,
        "lfu_reg": lfu_reg.__version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "transformers", "peft", "triton")},
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
    """The last commit that changed the library, this command left out; "+" if files of it have been edited since."""
    package = Path(lfu_reg.__file__).parent
    library = [".", ":(exclude)cli"]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments, "--", *library]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        except OSError:
            return ""

    return git("log", "-1", "--format=%h") + ("+" if git("status", "--porcelain") else "")


# Taken when the code is loaded: the files may be others by the time a measurement is over.
COMMIT = _commit()
