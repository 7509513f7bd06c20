"""Compiles the C++ kernel of a pair of dtypes with the system's compiler: under a second, once per process.

Nothing is left on disk, so there is no stale or foreign binary to guard against: the library is loaded from a temporary
folder that is gone afterwards.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from lfu_reg.distances.kernels.mse_layout import FIELDS

_SOURCE = Path(__file__).with_name("mse_over_layers.cpp")
_TYPES = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bfloat", torch.float16: "half"}
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-Wno-psabi")
_TIMEOUT = 120  # seconds


@cache
def library(clean: torch.dtype, perturbed: torch.dtype) -> Any:
    """The functions `forward` and `backward` of mse_over_layers.cpp for h and h' of these dtypes.

    Raises:
        OSError: if there is no compiler, or what it makes cannot be loaded.
        subprocess.SubprocessError: if it fails.
    """
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise FileNotFoundError("no C++ compiler (c++, g++, clang++, or $CXX) was found")
    if platform.system() not in ("Linux", "Darwin"):
        raise OSError(f"compiling on {platform.system()} is not supported")
    names = _TYPES[clean], _TYPES[perturbed]
    columns = ", ".join([*(field.upper() for field in FIELDS), "WIDTH"])
    source = "\n".join(
        [
            f"enum COLUMN {{ {columns} }};",
            f"#define CLEAN_TYPE {names[0]}",
            f"#define PERTURBED_TYPE {names[1]}",
            f"#define WIDE {'double' if 'double' in names else 'float'}",
            "#define USES_HALF" if "half" in names else "",
            _SOURCE.read_text(),
        ]
    )
    with tempfile.TemporaryDirectory(prefix="lfu_reg_") as folder:
        try:
            return _build(compiler, source, Path(folder) / "threads.so", ["-fopenmp"])
        except (OSError, subprocess.SubprocessError):
            return _build(compiler, source, Path(folder) / "plain.so", [])  # no OpenMP, so one thread


def _build(compiler: str, source: str, target: Path, options: list[str]) -> Any:
    unit, compiled = target.with_suffix(".cpp"), target.with_suffix(".o")
    unit.write_text(source)
    # Linked without OpenMP's library: its functions come from the one that torch has loaded, with torch's threads.
    steps = ["-c", *_FLAGS, *options, str(unit), "-o", str(compiled)], ["-shared", str(compiled), "-o", str(target)]
    for arguments in steps:
        subprocess.run([compiler, *arguments], capture_output=True, check=True, timeout=_TIMEOUT)
    loaded = ctypes.CDLL(str(target))
    pointer, number, threads = ctypes.c_void_p, ctypes.c_longlong, ctypes.c_int
    loaded.forward.argtypes = [pointer, number, pointer, threads]
    loaded.backward.argtypes = [pointer, number, pointer, pointer, pointer, threads]
    loaded.forward.restype = loaded.backward.restype = None
    return loaded
