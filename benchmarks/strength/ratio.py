"""Whether strength=1 gives a gradient ratio of one: read off what a step returns, not off the library's own metric.

    python -m strength.ratio [SIZE ...]   # in benchmarks/; appends to results/strength_ratio.csv

After 16 regularized steps, four micro-batches are each taken twice at the same weights: with the regularizer, and as
plain SFT. The difference of the two gradients is lam * grad l_cons. `low` and `high` are its length over that of SFT's
gradient, over the four; `summed` is the same of their sums, where the four are accumulated into one step. The steps
measured on are 16 to 19, at which the library does not measure everything.
"""

from __future__ import annotations

import argparse
import itertools
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from demo.train import Recipe, make_optimizer, sft_loss
from torch import Tensor, nn

from lfu_reg import LfURegularizer
from strength import store
from strength.sizes import AUXILIARIES, SIZES, batches_of, starting_point

STEPS, MEASURED = 16, 4
TOKENS = {"0.8M": (2, 64), "2.2M": (2, 48), "135M": (1, 32)}


@dataclass(frozen=True)
class Cell:
    """One setting."""

    size: str
    auxiliary: str
    dtype: str
    reduction: str
    micro_batches: int
    tuning: str


def cells(size: str) -> list[Cell]:
    """Every auxiliary and tuning with one thing changed at a time."""
    changes = (("float32", "mean", 1), ("float32", "mean", 4), ("float32", "sum", 1), ("bfloat16", "mean", 1))
    every = itertools.product(changes, AUXILIARIES, ("lora", "full"))
    return [Cell(size, a, *change, tuning) for change, a, tuning in every]


def main(arguments: list[str] | None = None) -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=list(SIZES), help=f"of {', '.join(SIZES)}")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for size in options.sizes:
        for cell in cells(size):
            if not store.has(store.rows("ratio"), **vars(cell)):
                store.append("ratio", {**vars(cell), **measured(cell)})


def measured(cell: Cell) -> dict[str, Any]:
    """The ratio of each micro-batch and of their sum, and what the metric says at the last of them."""
    samples, tokens = TOKENS[cell.size]
    model = starting_point(cell.size, 0, cell.tuning).to(getattr(torch, cell.dtype))
    # Small, so that weights in bfloat16 survive full tuning.
    optimizer = make_optimizer(model, SIZES[cell.size].recipe.lr if cell.tuning == "lora" else 1e-4)
    batches = batches_of(cell.size, 0, Recipe(STEPS + MEASURED, samples, 0.0, cell.tuning, tokens))
    plain, extra = [], []
    with LfURegularizer(model, cell.auxiliary, strength=1.0, reduction=cell.reduction, seed=0) as reg:
        for number, batch in enumerate(batches):
            if number < STEPS:
                (reg(model, batch, sft_loss) / cell.micro_batches).backward()
                if (number + 1) % cell.micro_batches == 0:
                    optimizer.step()
                    optimizer.zero_grad()
                continue
            plain.append(gradient(model, _plain(reg, model, batch)))
            extra.append(gradient(model, reg(model, batch, sft_loss)) - plain[-1])
        metric = float(reg.metrics["gradient_ratio"])
    ratios = [float(e.norm() / p.norm()) for e, p in zip(extra, plain, strict=True)]
    summed = float(torch.stack(extra).sum(0).norm() / torch.stack(plain).sum(0).norm())
    return {"low": min(ratios), "high": max(ratios), "summed": summed, "metric": metric}


def _plain(reg: LfURegularizer, model: nn.Module, batch: Any) -> Tensor:
    with reg.disabled():
        return reg(model, batch, sft_loss)


def gradient(model: nn.Module, loss: Tensor) -> Tensor:
    """As one vector in float32; the model's are dropped."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    found = [p.grad.flatten().float() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return torch.cat(found)


if __name__ == "__main__":
    main()
