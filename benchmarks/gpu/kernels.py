"""The fused distance on a GPU: kernel/'s opponents and rows, by the device's clock."""

from __future__ import annotations

import time
import traceback
from statistics import median
from typing import Any
from unittest import mock

import torch
from kernel.measure import PASSES, Shape, measure, row, states
from kernel.providers import Provider, eager, ours, providers

from gpu.place import Place

HEADLINE: Shape = (32, 2048, 4096, 1.0)  # 4 x 512 tokens of Llama-3.1-8B
SHAPES: tuple[Shape, ...] = (
    (32, 2048, 4096, 0.5),
    (32, 16, 64, 1.0),
    (32, 512, 1024, 1.0),
    (32, 2048, 1271, 1.0),
    (80, 2048, 8192, 1.0),
)
TINY: Shape = (2, 16, 64, 1.0)
TINY_HALF: Shape = (2, 16, 64, 0.5)
CALLS = 200
SECONDS = 80.0  # of trying tile sizes: each is compiled first


def headline(place: Place) -> dict[str, Any]:
    """bfloat16 at the shape that the thresholds are about."""
    copied = copy_bandwidth(place)
    return {"copy_bytes_per_second": copied, "rows": rows(place, place.sized(HEADLINE, TINY), torch.bfloat16, copied)}


def shapes(place: Place) -> dict[str, Any]:
    """Part of the positions, tiny, odd and large shapes, and float32; what was measured before an error is kept."""
    copied = copy_bandwidth(place)
    cases = [(shape, torch.bfloat16) for shape in place.sized(SHAPES, (TINY_HALF,))]
    cases += [(place.sized(HEADLINE, TINY), torch.float32)]
    found: list[dict[str, Any]] = []
    errors: dict[str, str] = {}
    for shape, dtype in cases:
        try:
            found += rows(place, shape, dtype, copied)
        except torch.OutOfMemoryError as error:
            errors[f"{shape} {dtype}"] = str(error).splitlines()[0]
        place.device.clear()
    return {"copy_bytes_per_second": copied, "rows": found, "errors": errors}


def launch_cost(place: Place) -> dict[str, Any]:
    """Microseconds that the host is busy with a call where nothing is to be computed, kernel and eager loop."""
    shape = place.sized((32, 8, 64, 1.0), TINY)
    clean, perturbed = states(shape, torch.bfloat16, place.device.name)
    found: dict[str, float] = {}
    for name, provider in (("kernel", ours(place.device.impl)), ("eager", eager)):
        for passes in ("forward", "both"):

            def call(provider: Any = provider, passes: str = passes) -> None:
                loss = provider(clean, perturbed, None)
                if passes == "both":
                    torch.autograd.grad(loss, perturbed)

            spent = []
            for number in range(place.sized(CALLS, 2) + 2):
                place.device.synchronize()  # so that no queue is full
                start = time.perf_counter()
                call()
                if number > 1:
                    spent.append(time.perf_counter() - start)
            found[f"{name}, {passes}"] = round(1e6 * median(spent), 1)
    return {"layers": shape[0], "host_us": found}


def tile_sizes(place: Place) -> dict[str, Any]:
    """The kernel with other tiles, warps and tiles per program at the headline shape; the shipped ones first."""
    launch: Any = triton_launch(place)
    shape = place.sized(HEADLINE, TINY)
    clean, perturbed = states(shape, torch.bfloat16, place.device.name)
    loss_of = ours(place.device.impl)
    shipped = (launch.TILE, launch.WARPS, launch.SHARE_FORWARD)
    others = [(tile, warps, share) for tile in (2048, 4096, 8192) for warps in (4, 8) for share in (1, 2, 4, 8, 16)]
    found: list[dict[str, Any]] = []
    began = time.monotonic()
    for tile, warps, share in [shipped, *place.sized(others, others[:1])]:
        if time.monotonic() - began > SECONDS:
            break
        both = launch.SHARE_BACKWARD if (tile, warps, share) == shipped else share
        settings = {"TILE": tile, "WARPS": warps, "SHARE_FORWARD": share, "SHARE_BACKWARD": both}
        with mock.patch.multiple(launch, **settings):
            forward, backward = [], []
            for _ in range(place.sized(9, 3)):
                spent, loss = place.device.seconds(lambda: loss_of(clean, perturbed, None))
                forward.append(spent)
                backward.append(place.device.seconds(lambda loss=loss: torch.autograd.grad(loss, perturbed))[0])
        us = {"forward_us": 1e6 * median(forward[2:]), "backward_us": 1e6 * median(backward[2:])}
        found.append({**settings, **{name: round(value, 1) for name, value in us.items()}})
    return {"settings": found}


def triton_launch(place: Place) -> Any:
    """The module whose settings are tried; in a rehearsal, which need not have triton, a stand-in with their names."""
    if place.rehearsal:
        return mock.Mock(TILE=4096, WARPS=4, SHARE_FORWARD=4, SHARE_BACKWARD=2)
    from lfu_reg.distances.kernels import triton_launch as launch

    return launch


def copy_bandwidth(place: Place) -> float:
    """Bytes per second that a copy on the device reads and writes."""
    source = torch.empty(place.sized(1 << 30, 1 << 16), dtype=torch.uint8, device=place.device.name)
    target = torch.empty_like(source)
    spent = [place.device.seconds(lambda: target.copy_(source))[0] for _ in range(place.sized(20, 5))]
    return 2 * source.numel() / median(spent)


def why_not(provider: Provider, dtype: torch.dtype, device: str) -> str:
    """The error of a provider on a tiny problem; nothing if it has none."""
    try:
        provider(*states((2, 16, 64, 1.0), dtype, device), None).backward()
    except Exception:
        return traceback.format_exc()
    return ""


def rows(place: Place, shape: Shape, dtype: torch.dtype, copied: float) -> list[dict[str, Any]]:
    """One row per provider and pass, and one that says why for a provider that cannot run."""
    if place.rehearsal:
        torch.compiler.set_stance("force_eager")  # the compiler takes a minute here, and is rehearsed in smoke.py
    here, own = place.device, place.sized("triton", "twin")
    candidates, found = {own: ours(here.impl), **providers()}, []
    for name in list(candidates):
        if error := why_not(candidates[name], dtype, here.name):
            del candidates[name]  # the others are measured
            found.append({"provider": name, "mode": "none", "error": error})
    times, memory = measure(candidates, shape, dtype, here.name, place.sized(20, 2), here.seconds, here.peak)
    for name, passes in times.items():
        for mode, spent in passes.items():
            line = row(shape, dtype, name, mode, spent)
            # Bytes are counted for the kernel alone, where all positions are selected.
            if name == own and shape[3] == 1.0:
                moved = PASSES[mode] * shape[0] * shape[1] * shape[2] * dtype.itemsize
                line["share_of_copy"] = round(moved / line["median_us"] * 1e6 / copied, 3)
            if mode == "both":
                line["extra_bytes"] = memory[name]
            found.append(line)
    return found
