"""Counts what one training step under FSDP2 communicates, and compares it with what shapes predict.

    python -m sharded          # in benchmarks/; writes results/collectives.json, which python -m step.page shows

Two processes on a CPU (gloo) shard a Llama and record every collective of a third step in the middle of training (at
the first ten the regularizer also measures how hard it pulls), and the operations of the next. `bytes.py` predicts both
from shapes, and is then asked about a model that no CPU holds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from lfu_reg import LfURegularizer
from lfu_reg.cli.environment import environment
from lfu_reg.cli.flops import flop_counter
from lfu_reg.cli.methods import go_to_mid_training
from lfu_reg.cli.workloads import Setting, language_model_loss, make_batch
from sharded.bytes import STEPS, Traffic
from sharded.cases import FORECAST, MEASURED, Case
from sharded.page import COLLECTIVES
from sharded.recorder import Collectives

RESULTS = Path(__file__).resolve().parents[1] / "results"
RANKS = 2


def main(arguments: list[str] | None = None) -> None:
    """Measure, predict and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    result = {
        "ranks": RANKS,
        "cases": compared(MEASURED),
        "forecasts": [forecast(case, ranks) for case, several in FORECAST for ranks in several],
        "surroundings": environment("cpu"),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "collectives.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {options.out / 'collectives.json'}")


def forecast(case: Case, ranks: int) -> dict[str, Any]:
    """Sizes, traffic and operations of a model that is not built."""
    return {
        "case": asdict(case),
        "ranks": ranks,
        "sizes": asdict(case.sizes(ranks)),
        "operations": case.operations,
        "predicted": case.predictions(ranks),
    }


def compared(cases: tuple[Case, ...], steps: tuple[str, ...] = tuple(STEPS)) -> list[dict[str, Any]]:
    """Counted and predicted figures by case and step, of two processes.

    Raises:
        RuntimeError: if the ranks counted different figures.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(_rank, (folder, cases, steps), nprocs=RANKS)
        counted, *others = (json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(RANKS))
    if any(other != counted for other in others):
        raise RuntimeError(f"ranks differ: {counted} and {others}")
    results = []
    for case, of_case in zip(cases, counted, strict=True):
        predicted = case.predictions(RANKS)
        results.append(
            {
                "case": asdict(case),
                "sizes": asdict(case.sizes(RANKS)),
                "counted": of_case,
                "predicted": {step: predicted[step] for step in steps},
            }
        )
    return results


def _rank(rank: int, folder: str, cases: tuple[Case, ...], steps: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    found = [{step: count_step(case, step, rank) for step in steps} for case in cases]
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def count_step(case: Case, step: str, rank: int) -> dict[str, Any]:
    """What one step of a freshly sharded model takes; to be called on every rank."""
    model, blocks = case.make_model("cpu")
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if case.mixed else MixedPrecisionPolicy()
    for block in blocks:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy, **({"reshard_after_forward": True} if case.root_is_freed else {}))
    torch.manual_seed(rank)
    loss = _loss(step, model, make_batch(model, Setting(batch=case.batch, tokens=case.tokens)))
    for _ in range(2):
        loss().backward()
    with Collectives() as seen:
        loss().backward()
    if others := seen.counts.keys() - set(COLLECTIVES):
        raise RuntimeError(f"{step} communicates by {', '.join(others)}, of which nothing is predicted.")
    with flop_counter() as flops:
        loss().backward()
    traffic = {kind: asdict(Traffic(seen.counts[kind], seen.bytes[kind])) for kind in COLLECTIVES}
    return {**traffic, "flops": int(flops.get_total_flops())}


def _loss(step: str, model: nn.Module, batch: Any) -> Callable[[], Any]:
    if step == "sft":
        return lambda: language_model_loss(model, batch)
    auxiliary, _, strategy = step.partition(", ")
    # With lam fixed: strength adds an all-reduce of a few numbers, and "retained" cannot do it here.
    settings: dict[str, Any] = {"strategy": strategy or "released", "alpha": 0.1, "lam": 1.0}
    reg = LfURegularizer(model, auxiliary, seed=0, **settings)  # type: ignore[arg-type]
    go_to_mid_training(reg)
    return lambda: reg(model, batch, language_model_loss)


if __name__ == "__main__":
    main()
