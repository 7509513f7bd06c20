"""What a step of one backward costs: processor time on the small Llama of docs/cost.md, interleaved with SFT.

python -m strength.price   # in benchmarks/; appends a row a method and tuning to results/strength_price.csv
"""

from __future__ import annotations

import argparse
import warnings

import torch

from lfu_reg.cli.methods import LFU, make_method
from lfu_reg.cli.timing import Clock, interleaved, peak_bytes, ratios
from lfu_reg.cli.workloads import Setting, make_workload
from strength import store

METHODS = ("sft", *LFU, *(f"{key}-one" for key in LFU))


def main(arguments: list[str] | None = None) -> None:
    """Measure both tunings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--tuning", nargs="+", default=["lora", "full"])
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for tuning in options.tuning:
        workload = make_workload(Setting("small", tuning, batch=options.batch, tokens=options.tokens))
        methods = [make_method(key, workload) for key in options.methods]
        seconds = interleaved(methods, Clock("cpu"), rounds=options.rounds, warmup=3)
        peaks = {method.key: peak_bytes(method, "cpu") for method in methods}
        for method in methods:
            spread = ratios(seconds[method.key], seconds["sft"])
            row = {"tuning": tuning, "method": method.label, "ratio": spread.median}
            more = {
                "low": spread.low,
                "high": spread.high,
                "ms": 1e3 * sorted(seconds[method.key])[options.rounds // 2],
            }
            peak = peaks[method.key] / peaks["sft"]
            about = {"batch": options.batch, "tokens": options.tokens, "rounds": options.rounds}
            store.append("price", {**row, **more, "peak": peak, **about})


if __name__ == "__main__":
    main()
