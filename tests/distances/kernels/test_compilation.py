"""The kernels compile to machine code for GPUs, at the shipped block sizes, without a GPU at hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
]

Usage = dict[str, dict[str, dict[str, int]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Usage:
    # A cache of its own: a cached binary would prove nothing about this source.
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run(
        [sys.executable, "-m", "tests.distances.kernels.compiled"],
        cwd=Path(__file__).parents[3],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    found: Usage = json.loads(run.stdout)
    return found


def test_nothing_is_spilled(results: Usage) -> None:
    assert {name.split(":")[0] for name in results} == {"sm_80", "sm_90"}
    for name, kernels in results.items():
        for kernel, usage in kernels.items():
            assert usage["spills"] == 0, (name, kernel, usage)


def test_aligned_layers_are_read_16_bytes_at_a_time(results: Usage) -> None:
    for name, kernels in results.items():
        if "hidden 4096" in name:
            assert all(usage["wide_loads"] >= 4 for usage in kernels.values()), (name, kernels)
            assert all(usage["narrow_stores"] == 0 for usage in kernels.values()), (name, kernels)


def test_offsets_are_64_bits(results: Usage) -> None:
    """Tensors beyond 2^31 elements: no address of a tile is formed from a 32-bit offset alone."""
    for name, kernels in results.items():
        for kernel, usage in kernels.items():
            assert usage["narrow_offsets"] == 0, (name, kernel)
