"""The step at the shape of Llama-3.1-8B: `lfu-reg overhead`'s rounds and rows, with every method there is."""

from __future__ import annotations

import cProfile
import functools
import pstats
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from step.others import OTHERS

import lfu_reg
from gpu.place import Place
from lfu_reg.cli.errors import Unusable
from lfu_reg.cli.methods import DEFAULT, VARIANTS, make_method
from lfu_reg.cli.overhead import measure
from lfu_reg.cli.plan import Plan
from lfu_reg.cli.published import PROCEDURES
from lfu_reg.cli.workloads import Setting, Workload, make_workload

SHOWN = 15  # functions and kernels that are listed
SECONDS = 100.0  # of interleaved rounds with all methods


KEYS = tuple(dict.fromkeys((*DEFAULT, *VARIANTS, *PROCEDURES, *OTHERS)))  # in order of worth


def setting(place: Place) -> Setting:
    """What the thresholds are about."""
    batch, tokens = place.sized((4, 512), (2, 8))
    name = place.sized("llama-3.1-8b", "tiny")
    return Setting(model=name, dtype="bfloat16", batch=batch, tokens=tokens, device=place.device.name)


@functools.cache
def workload(place: Place) -> Workload:
    """Built once in a process."""
    return make_workload(setting(place))


def exact(place: Place) -> dict[str, Any]:
    """SFT and the three exact steps, with phases and peaks."""
    return measured(place, DEFAULT, place.sized(20, 2))


def methods(place: Place) -> dict[str, Any]:
    """Every method once, alone: what it takes, or why it cannot run."""
    return {"methods": tried(place)}


def interleaved(place: Place) -> dict[str, Any]:
    """All that can run, in as many rounds as fit; without the largest, where all are too much for the memory."""
    rows = {key: row for key, row in tried(place).items() if "ms" in row}
    left_out: list[str] = []
    while True:
        fitting = int(1e3 * SECONDS / max(1.0, sum(row["ms"] for row in rows.values())))
        try:
            return {**measured(place, list(rows), place.sized(max(3, min(20, fitting)), 2)), "left_out": left_out}
        except Unusable:
            largest = max(rows, key=lambda key: rows[key]["peak_mb"])
            if largest in DEFAULT:
                raise
        left_out.append(largest)
        del rows[largest]
        place.device.clear()


def waits(place: Place) -> dict[str, Any]:
    """Lines at which the host waits for the device, in a step that is not the first."""
    found = {}
    for key in DEFAULT:
        method = make_method(key, workload(place))
        for _ in range(3):  # the first steps check more
            method.run()
        found[key] = place.device.waits(method.run)
    return {"lines": found}


def between(place: Place) -> dict[str, Any]:
    """What is neither forward nor backward: the library's own functions, and kernels beyond twice SFT's."""
    found: dict[str, Any] = {}
    for key in DEFAULT:
        method = make_method(key, workload(place))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wall = []
            for _ in range(4):
                place.device.synchronize()
                start = time.perf_counter()
                method.run()
                queued = time.perf_counter()
                place.device.synchronize()
                wall.append((time.perf_counter() - start, queued - start))
            profile = cProfile.Profile()
            profile.runcall(method.run)
            place.device.synchronize()
            kernels = place.device.kernels(method.run)
        found[key] = {
            "wall_ms": round(1e3 * median(w for w, _ in wall), 2),
            # Where this is nearly the wall time, the device waits for the host.
            "queued_after_ms": round(1e3 * median(q for _, q in wall), 2),
            "busy_ms": round(sum(us for _, us in kernels.values()) / 1e3, 2),
            "launches": sum(calls for calls, _ in kernels.values()),
            "own_functions": own_functions(profile),
            "kernels": kernels,
        }
    twice = {name: (2 * calls, 2 * us) for name, (calls, us) in found["sft"]["kernels"].items()}
    for entry in found.values():
        beyond = {
            name: (calls - twice.get(name, (0, 0))[0], us - twice.get(name, (0, 0.0))[1])
            for name, (calls, us) in entry.pop("kernels").items()
        }
        largest = sorted(beyond.items(), key=lambda item: -item[1][1])[:SHOWN]
        entry["beyond_twice_sft"] = [
            {"kernel": n[:160], "calls": c, "ms": round(us / 1e3, 3)} for n, (c, us) in largest
        ]
    return {"methods": found, "about": "functions are timed by cProfile, which makes each call slower than it is"}


def own_functions(profile: cProfile.Profile) -> list[dict[str, Any]]:
    """The library's own functions by the time in themselves."""
    package = str(Path(lfu_reg.__file__).parent)
    entries: Any = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    own = [
        {"function": f"{file[len(package) + 1 :]}:{line} {name}", "calls": calls, "own_ms": 1e3 * t, "ms": 1e3 * ct}
        for (file, line, name), (_, calls, t, ct, _) in entries.items()
        if file.startswith(package)
    ]
    largest = sorted(own, key=lambda e: -e["own_ms"])[:SHOWN]
    return [{**e, "own_ms": round(e["own_ms"], 3), "ms": round(e["ms"], 3)} for e in largest]


@functools.cache
def tried(place: Place) -> dict[str, dict[str, Any]]:
    """By key: milliseconds and peak of a second step, or the error in full."""
    found: dict[str, dict[str, Any]] = {}
    for key in KEYS:
        try:
            found[key] = alone(place, key)
        except Exception:
            found[key] = {"error": traceback.format_exc()}
        place.device.clear()
    return found


def alone(place: Place, key: str) -> dict[str, Any]:
    """One method, after a first step that compiles and checks."""
    with mock.patch.dict(PROCEDURES, OTHERS), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        method = make_method(key, workload(place))
        method.run()

        def step() -> int:
            method.run()
            return 0

        peak = place.device.peak(step)
        place.device.synchronize()
        start = time.perf_counter()
        method.run()
        place.device.synchronize()
        return {"ms": round(1e3 * (time.perf_counter() - start), 2), "peak_mb": round(peak / 1e6, 1)}


def measured(place: Place, keys: Sequence[str], rounds: int) -> dict[str, Any]:
    """A result of `lfu-reg overhead`, and the bytes of the clean states that a step keeps."""
    made, about = workload(place), setting(place)
    with mock.patch.dict(PROCEDURES, OTHERS):
        result = measure(about, Plan(tuple(keys), rounds=rounds), made, None)
    hidden = int(made.model.config.get_text_config().hidden_size)
    itemsize = getattr(torch, about.dtype).itemsize
    states = result["model"]["layers"] * about.batch * about.tokens * hidden * itemsize
    return {**result, "clean_states_mb": round(states / 1e6, 2)}
