"""`lfu-reg overhead`: time and memory of a step, method by method, and how far LfU's is from the floor."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch

from lfu_reg.cli.compiling import graphs_apart
from lfu_reg.cli.environment import environment
from lfu_reg.cli.errors import Unusable
from lfu_reg.cli.flops import Counts
from lfu_reg.cli.methods import BLOCKS, LFU, Method, blocks_alone, check_keys, make_method
from lfu_reg.cli.phases import BETWEEN, phases_of
from lfu_reg.cli.plan import Plan
from lfu_reg.cli.recommend import recommended
from lfu_reg.cli.timing import Clock, Spread, interleaved, peak_bytes, ratios
from lfu_reg.cli.workloads import Setting, Workload, samples_in
from lfu_reg.model.layers import choose_layers
from lfu_reg.step.loss_checks import check_loss

SCHEMA = "lfu-reg overhead 1"
PHASE_ROUNDS = 3
EAGER = "eager sft"


def measure(
    setting: Setting, plan: Plan, workload: Workload, counts: Counts | None, tick: Callable[[], object] = lambda: None
) -> dict[str, Any]:
    """Measure everything; the result is ready for JSON.

    Args:
        setting: what `workload` was made from.
        plan: how to measure.
        workload: the model with its batch and loss.
        counts: of the same setting, None where they cannot be had.
        tick: is called after every step of the interleaved rounds.

    Raises:
        Unusable: for a model that LfU cannot be attached to, or that does not fit into memory.
    """
    clock = Clock(setting.device)
    check_workload(workload)
    check_keys(plan.keys, workload)
    # With random weights the warnings about the regularizer's effect mean nothing.
    with graphs_apart() if setting.compile else nullcontext(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _measured(setting, plan, workload, counts, tick, clock)


def check_workload(workload: Workload) -> None:
    """Raise unless LfU has something to do: blocks to compare, and a loss to go up.

    Raises:
        Unusable: with what is missing.
    """
    try:
        choose_layers(workload.model, "all")
        check_loss(workload.sft_loss(workload.model, workload.batch), workload.model, first=True)
    except (ValueError, TypeError) as error:
        raise Unusable(f"LfU cannot train this model: {error}") from error


def _measured(
    setting: Setting,
    plan: Plan,
    workload: Workload,
    counts: Counts | None,
    tick: Callable[[], object],
    clock: Clock,
) -> dict[str, Any]:
    try:
        blocks = blocks_alone(workload)
        methods = [make_method(key, workload, compiled=setting.compile) for key in plan.keys]
        # The blocks alone are left by an exception, as no compiled model can be: their share is that of eager runs.
        eager = replace(make_method("sft", workload), key=EAGER) if setting.compile else methods[plan.keys.index("sft")]
        timed = [*methods, blocks, *([eager] if setting.compile else [])]
        seconds = interleaved(timed, clock, rounds=plan.rounds, warmup=plan.warmup, tick=tick)
        share = ratios(seconds[BLOCKS], seconds[eager.key]).median
        rows = [_row(method, seconds, 1 + share, workload, clock) for method in methods]
        return {
            "schema": SCHEMA,
            "setting": {**asdict(setting), "threads": torch.get_num_threads(), **asdict(plan)},
            "clock": clock.name,
            "model": _description(workload, setting),
            "blocks_share": round(share, 4),
            "floor": round(1 + share, 4),
            "counted": None if counts is None else counts.as_dict(),
            "rows": rows,
            "at_full_depth": _at_full_depth(rows, share, workload),
            "advice": recommended(plan, rows, workload, clock),
            "surroundings": environment(setting.device),
        }
    except torch.OutOfMemoryError as error:
        raise Unusable(
            f"{setting.device} ran out of memory: {str(error).splitlines()[0]} Use --layers N, a smaller --batch or "
            "--tokens, --checkpointing, --dtype bfloat16 or --tuning lora."
        ) from error


def _row(
    method: Method, seconds: dict[str, list[float]], floor: float, workload: Workload, clock: Clock
) -> dict[str, Any]:
    time, ratio = Spread.of(seconds[method.key]), ratios(seconds[method.key], seconds["sft"])
    phases = phases_of(method, workload, clock, PHASE_ROUNDS) if method.key in LFU else None
    total = sum(phases.values()) if phases else 1.0
    peak = peak_bytes(method, clock.device)
    weights = list(workload.model.parameters())
    resident = sum(p.nbytes for p in weights) + sum(p.nbytes for p in weights if p.requires_grad)
    return {
        "key": method.key,
        "method": method.label,
        "ms": _rounded(1e3 * time.median),
        "ms_quartiles": [_rounded(1e3 * time.low), _rounded(1e3 * time.high)],
        "ratio": round(ratio.median, 3),
        "ratio_quartiles": [round(ratio.low, 3), round(ratio.high, 3)],
        "over_floor": round(ratio.median / floor, 3),
        "tokens_per_second": round(_tokens(workload) / time.median, 1),
        "peak_mb": round(peak / 1e6, 2),
        "with_weights_mb": round((peak + resident) / 1e6, 2),
        "phases_ms": None if phases is None else {name: _rounded(1e3 * s) for name, s in phases.items()},
        "outside_of_passes": None if phases is None else round(sum(phases[name] for name in BETWEEN) / total, 4),
    }


def _at_full_depth(rows: list[dict[str, Any]], share: float, workload: Workload) -> dict[str, Any] | None:
    """Ratios of the model before it was truncated: the blocks' time grows with the depth, and so does what LfU adds."""
    if workload.full_depth is None:
        return None
    here = len(choose_layers(workload.model, "all"))
    factor = workload.full_depth / here
    sft = 1 + share * (factor - 1)

    def added(row: dict[str, Any]) -> float:
        shared = row["key"] == "steering"  # which runs the first block once, at any depth
        if here == shared:
            return share * (factor - 1)
        return float((row["ratio"] - 1) * (here * factor - shared) / (here - shared))

    return {
        "layers": workload.full_depth,
        "floor": round(1 + share * factor / sft, 4),
        "ratios": {row["key"]: round(1 + added(row) / sft, 3) for row in rows if row["key"] in LFU},
    }


def _description(workload: Workload, setting: Setting) -> dict[str, Any]:
    weights = list(workload.model.parameters())
    return {
        "own": setting.is_own,
        "class": type(getattr(workload.model, "base_model", workload.model)).__name__,
        "parameters": sum(p.numel() for p in weights),
        "trainable": sum(p.numel() for p in weights if p.requires_grad),
        "parameter_mb": round(sum(p.nbytes for p in weights) / 1e6, 2),
        "adam_mb": round(2 * sum(p.nbytes for p in weights if p.requires_grad) / 1e6, 2),
        "layers": len(choose_layers(workload.model, "all")),
        "tokens_per_step": _tokens(workload),
    }


def _tokens(workload: Workload) -> int:
    ids = workload.batch.get("input_ids") if hasattr(workload.batch, "get") else None
    return samples_in(workload.batch) if ids is None else ids.numel()


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
