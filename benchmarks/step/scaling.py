"""How a step's cost grows with batch, tokens, layers, hidden size, vocabulary and trained parameters.

    python -m step.scaling      # in benchmarks/; writes results/scaling.json and scaling.png

Small Llamas on one CPU thread, processor time, interleaved. The operations of every point's step are counted, too, so
that the prediction "ratio = counted operations of LfU / of SFT" is checked against measured ratios. The same counts are
then taken, on fake tensors, of models that no CPU runs.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm
from transformers import LlamaConfig

from lfu_reg.cli.configs import build
from lfu_reg.cli.environment import environment
from lfu_reg.cli.flops import count, flop_counter
from lfu_reg.cli.methods import Method, make_method
from lfu_reg.cli.timing import Clock, interleaved, ratios
from lfu_reg.cli.workloads import Setting, Workload, language_model_loss, make_batch, with_adapter

RESULTS = Path(__file__).resolve().parents[1] / "results"
KEYS = ("sft", "steering", "lora")
BASE = {"batch": 4, "tokens": 64, "layers": 4, "hidden": 128, "vocabulary": 1024, "trained rank": 8}
AXES = {
    "batch": (2, 4, 8),
    "tokens": (32, 64, 128),
    "layers": (2, 4, 8),
    "hidden": (64, 128, 256),
    "vocabulary": (512, 2048, 8192),
    "trained rank": (2, 8, 32),
}
LARGE = ("qwen3-0.6b", "qwen3-8b", "llama-2-7b", "llama-3.1-8b", "llama-3.1-70b")
LARGE_TOKENS = (2048,)


def main(arguments: list[str] | None = None) -> None:
    """Measure, count and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    points = [(axis, value) for axis, values in AXES.items() for value in values]
    measured = [point(axis, value, options.rounds) for axis, value in tqdm(points, desc="points", leave=False)]
    result = {
        "base": BASE,
        "rounds": options.rounds,
        "points": measured,
        "exponents": {
            axis: {key: exponent(axis, measured, lambda p, k=key: p["ms"][k]) for key in KEYS} for axis in AXES
        },
        "large": [large(name, tokens) for name in LARGE for tokens in LARGE_TOKENS],
        "surroundings": environment("cpu"),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "scaling.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(result, options.out / "scaling.png")
    print(f"written to {options.out / 'scaling.json'} and scaling.png")


def point(axis: str, value: int, rounds: int) -> dict[str, Any]:
    """Time and counted operations at the base size with one thing changed."""
    size = {**BASE, axis: value}
    workload = small_llama(size, "cpu")
    methods = [make_method(key, workload) for key in KEYS]
    seconds = interleaved(methods, Clock("cpu"), rounds=rounds, warmup=1)
    counted = {method.key: operations(method) for method in methods}
    return {
        "axis": axis,
        "value": value,
        "trained": sum(p.numel() for p in workload.model.parameters() if p.requires_grad),
        "ms": {key: round(1e3 * median(seconds[key]), 3) for key in KEYS},
        "ratio": {key: round(ratios(seconds[key], seconds["sft"]).median, 3) for key in KEYS},
        "counted_gflop": {key: round(flops / 1e9, 4) for key, flops in counted.items()},
        "counted_ratio": {key: round(counted[key] / counted["sft"], 3) for key in KEYS},
    }


def operations(method: Method) -> int:
    """Of the matrix products and attention of one step."""
    with flop_counter() as flops:
        method.run()
    return int(flops.get_total_flops())


def small_llama(size: dict[str, int], device: str) -> Workload:
    """A Llama with an adapter."""
    config = LlamaConfig(
        hidden_size=size["hidden"],
        intermediate_size=int(2.6875 * size["hidden"]),
        num_hidden_layers=size["layers"],
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=size["vocabulary"],
    )
    model = with_adapter(build(config, "float32", device), device, rank=size["trained rank"])
    setting = Setting(batch=size["batch"], tokens=size["tokens"], device=device)
    return Workload(model.train(), make_batch(model, setting), language_model_loss)


def large(name: str, tokens: int) -> dict[str, Any]:
    """Counted operations and sizes of one sample on a large model, tuned by LoRA in bfloat16."""
    counts = count(Setting(model=name, batch=1, tokens=tokens, dtype="bfloat16"), KEYS)
    return {
        "model": name,
        "tokens": tokens,
        "parameters": counts.parameters,
        "trainable": counts.trainable,
        "parameter_gb": round(counts.parameter_bytes / 1e9, 2),
        "gradient_mb": round(counts.gradient_bytes / 1e6, 1),
        "blocks_share": round(counts.blocks_share or math.nan, 4),
        "sft_tflop": round(counts.steps["sft"].flops / 1e12, 2),
        "ratio": {key: round(counts.steps[key].flops / counts.steps["sft"].flops, 3) for key in ("steering", "lora")},
        "saved_gb": round(counts.saved_bytes / 1e9, 2),
    }


def exponent(axis: str, points: list[dict[str, Any]], of: Callable[[dict[str, Any]], float]) -> float:
    """Slope of the least-squares line through log(value), log(time)."""
    xs = [math.log(p["value"]) for p in points if p["axis"] == axis]
    ys = [math.log(of(p)) for p in points if p["axis"] == axis]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return round(covariance / sum((x - mean_x) ** 2 for x in xs), 3)


def plot(result: dict[str, Any], file: Path) -> None:
    """Time per step over each axis, and the ratio that was counted against the one that was measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    labels = {"sft": "SFT", "steering": "LfU steering", "lora": "LfU LoRA"}
    figure, axes = plt.subplots(2, 4, figsize=(15, 7), constrained_layout=True)
    panels = list(axes.flat)
    for panel, axis in zip(panels, AXES, strict=False):
        points = [p for p in result["points"] if p["axis"] == axis]
        for key in KEYS:
            slope = result["exponents"][axis][key]
            xs, ys = [p["value"] for p in points], [p["ms"][key] for p in points]
            panel.plot(xs, ys, "o-", label=f"{labels[key]}: exponent {slope:.2f}")
        panel.set(xscale="log", yscale="log", xlabel=axis, ylabel="ms per step")
        panel.set_xticks([p["value"] for p in points], [str(p["value"]) for p in points])
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        panel.yaxis.set_major_formatter(ScalarFormatter())
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.minorticks_off()
        panel.legend(fontsize=8)
    panel = panels[len(AXES)]
    for key in ("steering", "lora"):
        xs, ys = ([p[kind][key] for p in result["points"]] for kind in ("counted_ratio", "ratio"))
        panel.plot(xs, ys, "o", label=labels[key])
    low, high = panel.get_xlim()
    panel.plot([low, high], [low, high], "k--", linewidth=1, label="measured = counted")
    panel.set(xlabel="counted ratio to SFT", ylabel="measured ratio to SFT")
    panel.legend(fontsize=8)
    panels[-1].axis("off")
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
