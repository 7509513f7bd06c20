"""Two gloo processes on one CPU, started by torchrun: the gradients of one process with the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch.distributed as dist

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

ROOT = Path(__file__).resolve().parents[2]
LOOPS = {"accelerate": "accelerate", "lightning": "lightning", "trainer": "transformers", "sft": "trl"}


@pytest.mark.slow
def test_two_processes() -> None:
    loops = [loop for loop, package in LOOPS.items() if find_spec(package)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, "-m", "tests.integrations.launched.loops", *loops]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    for loop in loops:
        for rank in (0, 1):
            assert f"{loop} has the right gradients in process {rank}" in done.stdout
