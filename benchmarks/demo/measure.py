"""What a training step costs: time from interleaved steps, memory from the allocator."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from demo.methods import BASELINE, Method
from demo.train import Batch, Recipe, make_optimizer, sft_loss, trainable_copy

MEMORY_MEANING = "peak of one step's allocations above weights and optimizer state"


@dataclass(frozen=True)
class Cost:
    """What one training step of a method costs."""

    step_ms: float  # median
    step_ms_quartiles: tuple[float, float]
    ratio: float  # median over rounds of the ratio to the baseline's step of the same round
    ratio_quartiles: tuple[float, float]
    peak_bytes: int


def measure_costs(
    base: PreTrainedModel, methods: list[Method], batch: Batch, recipe: Recipe, rounds: int
) -> dict[str, Cost]:
    """Measures all methods side by side in this process.

    Each round times one step of every method on the same batch, so slow phases of the machine hit all of them.
    """
    device = batch["input_ids"].device
    with ExitStack() as cleanup:
        steps = {m.key: _training_step(base, m, batch, recipe, cleanup) for m in methods}
        for step in steps.values():
            step()
            step()
        peaks = {key: peak_memory(step, device) for key, step in steps.items()}
        times: dict[str, list[float]] = {key: [] for key in steps}
        for _ in range(rounds):
            for key, step in steps.items():
                times[key].append(_seconds(step, device))
    reference = times.get(BASELINE)
    return {key: _cost(times[key], reference, peaks[key]) for key in steps}


def _training_step(
    base: PreTrainedModel, method: Method, batch: Batch, recipe: Recipe, cleanup: ExitStack
) -> Callable[[], None]:
    model = trainable_copy(base, recipe.tuning, seed=0)
    optimizer = make_optimizer(model, recipe.lr)
    reg = method.regularizer(model, seed=0)
    if reg:
        cleanup.callback(reg.remove)

    def step() -> None:
        loss = reg(model, batch, sft_loss) if reg else sft_loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _seconds(step: Callable[[], None], device: torch.device) -> float:
    _synchronize(device)
    started = time.perf_counter()
    step()
    _synchronize(device)
    return time.perf_counter() - started


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cost(times: list[float], reference: list[float] | None, peak: int) -> Cost:
    ratios = [t / r for t, r in zip(times, reference, strict=True)] if reference else [float("nan")]
    low, middle, high = _quartiles(times)
    ratio_low, ratio, ratio_high = _quartiles(ratios)
    return Cost(1e3 * middle, (1e3 * low, 1e3 * high), ratio, (ratio_low, ratio_high), peak)


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def peak_memory(step: Callable[[], None], device: torch.device) -> int:
    """Most bytes that were allocated at a time during the step, above what was allocated before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # The CPU allocator keeps no peak, but the profiler records each of its allocations and frees.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    handle, name = tempfile.mkstemp(suffix=".json")
    os.close(handle)
    try:
        recorded.export_chrome_trace(name)
        with open(name, encoding="utf-8") as file:
            events = [e for e in json.load(file)["traceEvents"] if e.get("name") == "[memory]"]
    finally:
        os.unlink(name)
    live = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak
