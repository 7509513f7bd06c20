"""A process that runs the waiting parts of a stage and writes down each as it ends: `python -m gpu.child STAGE FILE`.

It is started again for what is left, should it die, hang, or lose its device.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path

from gpu.place import Device, Place, Skipped
from gpu.record import FAILED, NO_MEMORY, OK, SKIPPED, WAITING, Record
from gpu.stages import FAILURES, STAGES, Part

DEVICE_LOST = 75  # the exit code that asks for another process


def main(arguments: list[str] | None = None) -> int:
    """Run what waits."""
    parser = argparse.ArgumentParser()
    parser.add_argument("stage")
    parser.add_argument("file", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--commit", default="")
    options = parser.parse_args(arguments)
    (stage,) = (stage for stage in (FAILURES, *STAGES) if stage.name == options.stage)
    record = Record(options.file)
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    place = Place(device(options.rehearse), options.rehearse, options.model)
    if not record.content["surroundings"]:
        about = place.device.about()
        record.content["surroundings"] = {**about, "commit": options.commit or about["commit"] or "unknown"}
    parts = {part.name: part for part in stage.parts}
    for name in record.named(WAITING):
        record.start(name)
        if not run(parts[name], place, record):
            return DEVICE_LOST
    return 0


def end_with(parent: int) -> None:
    """An orphan would go on to keep the device busy: it has a session of its own, which nobody else ends."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def device(rehearse: bool) -> Device:
    """The GPU, or what stands in for it."""
    if rehearse:
        from gpu.stand_in import Processor

        return Processor()
    from gpu.cuda_only import Cuda

    return Cuda()


def run(part: Part, place: Place, record: Record) -> bool:
    """One part, and whether the device is still there."""
    module, function = part.function.split(":")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = getattr(importlib.import_module(f"gpu.{module}"), function)(place)
            place.device.synchronize()  # errors of kernels come up late
        json.dumps(result)  # what cannot be written is a mistake of this part, too
        # Among them would be that the kernel does not work, and its twin has been measured.
        said = dict.fromkeys(str(w.message) for w in caught if w.category.__name__ == "LfUWarning")
        record.end(part.name, OK, result=result, warnings=list(said))
        return True
    except Skipped as reason:
        record.end(part.name, SKIPPED, why=str(reason))
        return True
    except Exception as error:
        # By name: torch takes seconds to import, and a part that fails before it does has no need of it.
        state = NO_MEMORY if type(error).__name__ == "OutOfMemoryError" else FAILED
        record.end(part.name, state, error=traceback.format_exc())
    alive = place.device.is_alive()
    if alive:
        place.device.clear()  # the traceback, which held the tensors, is gone by now
    return alive


if __name__ == "__main__":
    sys.exit(main())
