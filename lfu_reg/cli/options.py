"""What is given on the command line: read, and refused at once where nothing can come of it."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

import torch
import typer

from lfu_reg.cli.errors import Unusable
from lfu_reg.model.layers import LayerChoice


def check_device(device: str) -> None:
    """Raise unless there is such a device."""
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise Unusable(f"--device {device}: no such kind of device; allowed are cpu, cuda and cuda:N.") from error
    if kind not in ("cpu", "cuda") or device.startswith("cpu:"):
        raise Unusable(f"--device {device}: measuring knows cpu, cuda and cuda:N.")
    found = torch.cuda.device_count()
    if kind == "cuda" and (torch.device(device).index or 0) >= found:
        raise Unusable(
            f"--device {device}: torch {torch.__version__} sees {found} GPU(s). Use --device cpu, or install a CUDA or "
            "ROCm build of torch and check the driver."
        )


def check_threads(threads: int) -> None:
    """Raise for more threads than there are processors: they would wait for each other, and measure that."""
    processors = os.cpu_count() or 1
    if threads > processors:
        raise Unusable(
            f"--threads {threads}: the machine has {processors} processor(s); allowed are 1 to {processors}."
        )


def check_left_to_the_function(context: typer.Context, *names: str) -> None:
    """Raise if one of the options was given: MODEL is a function, which makes model and batch as it likes."""
    given = [name for name in names if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"]
    if given:
        raise Unusable(
            f"{', '.join(f'--{name}' for name in given)}: {context.params['model']} makes its model and batch itself, "
            f"so the option{'s' * (len(given) > 1)} would change nothing; say it in the function."
        )


def parse_bytes(text: str) -> float:
    """Bytes from "40GB", "800 MB" or "1.5e9"."""
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([kMGT]?)i?B?\s*", text, re.IGNORECASE)
    try:
        number = float(match[1]) if match else 0.0
    except ValueError:
        number = 0.0
    if match is None or not number > 0:
        raise Unusable(f"--memory-budget {text}: give a size such as 40GB or 800MB.")
    return number * 1000.0 ** " kmgt".index((match[2] or " ").lower())


def parse_layers(text: str) -> LayerChoice:
    """An index, a list of indices or names, or a word, as LfURegularizer takes them."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    if isinstance(value, tuple):  # 0,1 without brackets
        return list(value)
    return value if isinstance(value, (int, list)) else text


def check_writable(file: Path | None, option: str = "--json") -> None:
    """Raise at once, rather than after the measurement, where the result could not be written."""
    if file is None:
        return
    existed = file.exists()
    try:
        file.open("a").close()  # permissions alone do not tell: the administrator has them all, and /proc takes no file
    except OSError as error:
        raise Unusable(
            f"{option} {file}: no file can be written there ({error.strerror}); give a file in a folder that exists."
        ) from error
    if not existed:
        file.unlink()
