"""Runs a stage in processes of its own, so that nothing that happens in one reaches the next."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from gpu.child import DEVICE_LOST
from gpu.record import DIED, HUNG, RUNNING, WAITING, Record
from gpu.stages import Stage

ROOT = Path(__file__).resolve().parents[2]
START = 180.0  # seconds that a process may take before its first part: imports from a cold disk
LOOK = 0.1  # seconds between two looks at a process
TAIL = 4000  # characters of a dead process's output that are kept
LEAST = 2.0  # seconds that are worth a start


def run_stage(stage: Stage, path: Path, until: float, options: list[str], environment: dict[str, str]) -> Record:
    """Run all parts, as far as time allows.

    Args:
        stage: what to run.
        path: of the result file.
        until: moment of `time.monotonic` at which the whole command ends.
        options: of the child.
        environment: variables that are set for it.
    """
    record = Record.begin(path, stage.name, [part.name for part in stage.parts], rehearsal="--rehearse" in options)
    until = min(until, time.monotonic() + 60 * stage.minutes)
    while record.named(WAITING) and time.monotonic() + LEAST < until:
        record = _attempt(stage, path, until, options, environment)
    return record


def _attempt(stage: Stage, path: Path, until: float, options: list[str], environment: dict[str, str]) -> Record:
    """One process; what it leaves open is judged by how it ended."""
    command = [sys.executable, "-m", "gpu.child", stage.name, str(path), *options]
    paths = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **environment,
    }
    with tempfile.TemporaryFile() as output:
        # A session of its own: what a part has started ends with it.
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=variables
        )
        try:
            why = _watched(process, stage, path, until)
        finally:
            _kill(process)
        output.seek(0)
        said = output.read().decode(errors="replace")[-TAIL:]
    record = Record(path)
    code = process.returncode
    unfinished = record.named(RUNNING)
    if not unfinished and why != TIME_IS_UP and code not in (0, DEVICE_LOST):
        unfinished = record.named(WAITING)  # another process would end before its first part as well
    for name in unfinished:
        ended = f"ended with {signal.Signals(-code).name if code < 0 else code}"
        record.end(name, HUNG if why else DIED, error=f"{why or ended}\n{said}".strip())
    return record


TIME_IS_UP = "time is up"


def _watched(process: subprocess.Popen[bytes], stage: Stage, path: Path, until: float) -> str:
    """Wait for a process; why it has to be ended, or nothing once it has ended itself."""
    limits = {part.name: part.seconds for part in stage.parts}
    started, current, since = time.monotonic(), "", time.monotonic()
    while process.poll() is None:
        now = time.monotonic()
        if now > until:
            return TIME_IS_UP
        running = next(iter(Record(path).named(RUNNING)), "")
        if running != current:
            current, since = running, now
        if running and now - since > limits[running]:
            return f"no end after {limits[running]:g} s"
        if not running and now - max(since, started) > START:
            return f"no part began within {START:g} s"
        time.sleep(LOOK)
    return ""


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
