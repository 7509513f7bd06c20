"""Start two processes that run the same checks, and hand their results to the tests.

Starting costs seconds, so one launch runs all checks of a module. A check is a function `check_*()` without arguments
that runs on every rank at the same time and raises if something is wrong. After a failure the launch ends: what the
other rank waits for will never come.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

RANKS = 2
ROOT = Path(__file__).resolve().parents[2]


def names_of(module: str) -> list[str]:
    """The checks in a module, in the order of their definition."""
    return [name for name in vars(importlib.import_module(module)) if name.startswith("check_")]


class Results:
    """What every rank wrote about every check.

    Args:
        folder: where the ranks write.
        exit_codes: of the ranks; None for one that was killed when its time was over.
    """

    def __init__(self, folder: Path, exit_codes: list[int | None]) -> None:
        self.exit_codes = exit_codes
        self.output = [(folder / f"{rank}.out").read_text()[-8000:] for rank in range(len(exit_codes))]
        self.by_rank = [_read(folder / f"{rank}.jsonl") for rank in range(len(exit_codes))]

    def expect(self, check: str) -> None:
        """Fail the running test unless every rank has passed the check."""
        for rank, results in enumerate(self.by_rank):
            ended_well = ("passed", "skipped: ")
            failed = next((name for name, result in results.items() if not result.startswith(ended_well)), None)
            if check not in results and failed is not None:
                pytest.fail(f"not run: {failed} failed before", pytrace=False)
            if check not in results:
                ended = self.exit_codes[rank]
                state = "ran out of time" if ended is None else f"ended with exit code {ended}"
                pytest.fail(f"rank {rank} did not get to {check}: it {state}\n{self.output[rank]}", pytrace=False)
            if results[check].startswith("skipped: "):
                pytest.skip(results[check].removeprefix("skipped: "))
            if results[check] != "passed":
                pytest.fail(f"rank {rank}: {results[check]}", pytrace=False)

    def expect_clean_end(self) -> None:
        """Fail the running test unless every process has ended by itself, without an error."""
        assert self.exit_codes == [0] * len(self.exit_codes), self.output


def launch(module: str, folder: Path, *, seconds: float = 240.0, python: str = sys.executable) -> Results:
    """Run the checks of a module on all ranks.

    One of FSDP2's processes once aborted in malloc, with a cause not found yet. After an abort,
    and nothing else, the checks are run once more; a warning tells where it happened.

    Args:
        module: with `check_*` functions.
        folder: empty, for the rendezvous (a file, so that no port is needed) and the results.
        seconds: after which processes are killed.
        python: interpreter.
    """
    first, second = folder / "first", folder / "second"
    first.mkdir()
    results = _launch(module, first, seconds, python)
    if -signal.SIGABRT not in results.exit_codes:
        return results
    warnings.warn(f"{module}: exit codes {results.exit_codes}\n{results.output}", stacklevel=2)
    second.mkdir()
    return _launch(module, second, seconds, python)


def _launch(module: str, folder: Path, seconds: float, python: str) -> Results:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",
        "HF_HUB_OFFLINE": "1",
        "WORLD_SIZE": str(RANKS),
        "LFU_TEST_FOLDER": str(folder),
    }
    processes = []
    for rank in range(RANKS):
        with open(folder / f"{rank}.out", "w") as output:
            processes.append(
                subprocess.Popen(
                    [python, "-m", "tests.distributed.worker", module],
                    cwd=ROOT,
                    env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
    deadline = time.monotonic() + seconds
    codes: list[int | None] = []
    try:
        for process in processes:
            codes.append(_wait(process, deadline))
            if codes[-1] != 0:
                deadline = min(deadline, time.monotonic() + 10)  # its partner waits in vain
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return Results(folder, codes)


def _wait(process: subprocess.Popen[bytes], deadline: float) -> int | None:
    try:
        return process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None


def _read(path: Path) -> dict[str, str]:
    lines = path.read_text().splitlines() if path.exists() else []
    return {entry["check"]: entry["result"] for entry in map(json.loads, lines)}
