"""Runs every check with Triton's interpreter on the CPU; prints {check: error or ""} as JSON."""

from __future__ import annotations

import json
import os
import sys
import traceback

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import torch

from tests.distances.kernels.checks import CHECKS


def main() -> None:
    torch.set_num_threads(1)
    results = {}
    for name, function in CHECKS.items():
        torch.manual_seed(0)
        try:
            function("cpu", "triton")
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    main()
