"""Fine-tuning runs over strengths, fixed lambdas, learning rates and strategies; one row a run.

    python -m strength.training transfer --sizes 2.2M   # in benchmarks/; appends to results/strength_training.csv
    python -m strength.training scores
    python -m strength.training perturbed

Fixed before the first run. A run's score is the held-out loss of the task plus the rise over the base model of the loss
on what it could do before (WikiText; for the 0.8 M model the skills that are not fine-tuned), both in nats per token:
less is better. The best strength of a model and an auxiliary is the one with the lowest mean score over seeds. Strength
0 is SFT at the same learning rate. A strength transfers if the best ones are within a factor of three of each other
between models; lambda does not if the lambdas that these strengths came to differ by more than twenty.

lambda is compared at one alpha: to first order only alpha times lambda matters, so `product` is their median product.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from demo.eval import score
from demo.train import make_optimizer, sft_loss
from evidence.tasks import TASKS
from torch import nn

from lfu_reg import LfURegularizer
from strength import store
from strength.sizes import AUXILIARIES, SIZES, base_of, batches_of, starting_point

STRENGTHS = (1.0, 3.0, 0.3, 10.0, 0.1)
RATES = (1e-3, 1.4e-3, 7e-4)


@dataclass(frozen=True)
class Run:
    """All that determines one.

    Attributes:
        size: key in SIZES.
        task: key in `evidence.tasks.TASKS`.
        auxiliary: theta_aux, "" for SFT.
        setting: what is varied: "strength", "lam" (beside alpha), "lr", "one-backward" or "perturbed" (strengths too).
        value: of it.
        seed: of data, adapter and order.
    """

    size: str
    task: str
    auxiliary: str
    setting: str
    value: float
    seed: int


def transfer(sizes: list[str], seeds: int, task: str | None = None) -> Iterator[Run]:
    """The strengths for every auxiliary, and SFT over learning rates; a seed at a time."""
    for seed in range(seeds):
        for size in sizes:
            chosen = task or SIZES[size].task
            yield Run(size, chosen, "", "lr", SIZES[size].recipe.lr, seed)
            for strength in STRENGTHS:
                for auxiliary in AUXILIARIES:
                    yield Run(size, chosen, auxiliary, "strength", strength, seed)
            for rate in RATES:
                yield Run(size, chosen, "", "lr", rate, seed)


def fixed(sizes: list[str], seeds: int, task: str | None = None) -> Iterator[Run]:
    """The lambda that strength 1 came to at the same seed, and three times more and less, held fixed."""
    for row in store.rows("training"):
        wanted = row["size"] in sizes and int(row["seed"]) < seeds and row["task"] == (task or SIZES[row["size"]].task)
        if wanted and row["setting"] == "strength" and row["value"] == "1":
            for factor in (1, 1 / 3, 3):
                lam = float(f"{float(row['lam']) * factor:.3g}")
                yield Run(
                    row["size"], row["task"], row["auxiliary"], f"lam at alpha {row['alpha']}", lam, int(row["seed"])
                )


def scores(sizes: list[str], seeds: int, task: str | None = None) -> Iterator[Run]:
    """Exact steps and steps of one backward at strength 1, paired by seed."""
    for seed in range(seeds):
        for size in sizes:
            for auxiliary in AUXILIARIES:
                for setting in ("strength", "one-backward"):
                    yield Run(size, task or SIZES[size].task, auxiliary, setting, 1.0, seed)


def perturbed(sizes: list[str], seeds: int, task: str | None = None) -> Iterator[Run]:
    """stop_gradient="perturbed" at strength 1 and below."""
    for seed in range(seeds):
        for size in sizes:
            for value in (1.0, 0.3):
                for auxiliary in AUXILIARIES:
                    yield Run(size, task or SIZES[size].task, auxiliary, "perturbed", value, seed)


PLANS = {"transfer": transfer, "fixed": fixed, "scores": scores, "perturbed": perturbed}


def main(arguments: list[str] | None = None) -> None:
    """Carry out what is missing of a plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", choices=PLANS)
    parser.add_argument("--sizes", nargs="+", default=["2.2M"], choices=SIZES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--task", choices=TASKS, help="instead of the size's own")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for run in PLANS[options.plan](options.sizes, options.seeds, options.task):
        key = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in asdict(run).items()}
        if not store.has(store.rows("training"), **key):
            store.append("training", {**asdict(run), **figures(run)})


def figures(run: Run) -> dict[str, Any]:
    """Train and examine; numbers of the regularizer are medians over steps, 0 for SFT."""
    size = SIZES[run.size]
    rate = run.value if run.setting == "lr" else size.recipe.lr
    recipe = replace(size.recipe, lr=rate)
    model = starting_point(run.size, run.seed)
    optimizer = make_optimizer(model, rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=recipe.steps)
    torch.manual_seed(run.seed)
    reg = regularizer(model, run)
    started, seen, losses = time.process_time(), [], []
    for batch in batches_of(run.size, run.seed, recipe, run.task):
        loss = sft_loss(model, batch) if reg is None else reg(model, batch, sft_loss)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach() if reg is None else reg.metrics["sft_loss"]))
        if reg is not None and "gradient_ratio" in reg.metrics:
            seen.append({name: float(reg.metrics[name]) for name in ("lam", "alpha", *MEASURED)})
    if reg is not None:
        reg.remove()
    seconds = time.process_time() - started
    domain, kept = examined(run.size, run.task, model)
    medians = {
        name: statistics.median(row[name] for row in seen) if seen else 0.0 for name in ("lam", "alpha", *MEASURED)
    }
    return {
        "domain": domain,
        "kept": kept,
        "rise": kept - base(run.size, run.task)[1],
        "train": statistics.fmean(losses[-8:]),
        **medians,
        "product": statistics.median(row["lam"] * row["alpha"] for row in seen) if seen else 0.0,
        "seconds": seconds,
    }


MEASURED = ("gradient_ratio", "gradient_cosine", "relative_distance")


def regularizer(model: nn.Module, run: Run) -> LfURegularizer | None:
    """Of the run, None for SFT."""
    if not run.auxiliary:
        return None
    options: dict[str, Any] = {"strength": run.value}
    if run.setting.startswith("lam at alpha "):
        options = {"lam": run.value, "alpha": float(run.setting.rpartition(" ")[2])}
    elif run.setting == "one-backward":
        options["strategy"] = "one-backward"
    elif run.setting == "perturbed":
        options["stop_gradient"] = "perturbed"
    return LfURegularizer(model, run.auxiliary, seed=run.seed, **options)


def examined(size: str, task: str, model: nn.Module) -> tuple[float, float]:
    """The held-out loss of the task, and the loss on what the base model knew."""
    tokenizer = base_of(size)[1]
    examples = replace(SIZES[size], task=task)
    domain = score(model, tokenizer, examples.held_out(), examples.recipe.max_length, batch_size=16).loss
    ends = size == "0.8M"  # skills have an end, pieces of text none
    return domain, score(model, tokenizer, examples.known(), 256, batch_size=16, ends=ends).loss


@functools.cache
def base(size: str, task: str) -> tuple[float, float]:
    """Both of the base model."""
    return examined(size, task, base_of(size)[0])


if __name__ == "__main__":
    main()
