"""One rank of a launch: runs the checks of the module named on the command line, or those named after it."""

from __future__ import annotations

import datetime
import importlib
import json
import os
import sys
import time
import traceback
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lfu_reg import LfUWarning
from tests.distributed.launch import names_of

# As in the whole suite: exactness is tested at alphas and lambdas that nobody would train with.
STRENGTH = "LfU (has no effect. the gradient|outweighs|measures rounding)"


def main(module: str, *names: str) -> int:
    folder, rank = Path(os.environ["LFU_TEST_FOLDER"]), int(os.environ["RANK"])
    torch.set_num_threads(1)
    warnings.simplefilter("error", LfUWarning)
    warnings.filterwarnings("ignore", STRENGTH, LfUWarning)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=datetime.timedelta(seconds=60),
    )
    checks = importlib.import_module(module)
    failed = False
    for name in names or names_of(module):
        torch.manual_seed(0)
        start, result = time.monotonic(), "passed"
        try:
            getattr(checks, name)()
        except pytest.skip.Exception as skipped:  # on all ranks alike
            result = f"skipped: {skipped}"
        except BaseException:
            result, failed = traceback.format_exc(), True
        with open(folder / f"{rank}.jsonl", "a") as file:
            file.write(json.dumps({"check": name, "result": result, "seconds": time.monotonic() - start}) + "\n")
        if failed:
            break
        dist.barrier()
    if not failed:
        dist.destroy_process_group()
    return int(failed)


if __name__ == "__main__":
    sys.stdout.flush()
    code = main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(code) if code else sys.exit(0)
