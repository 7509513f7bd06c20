"""The gradient of l_cons in bfloat16 against float32, over the displacement of the hidden states.

    python -m strength.rounding [SIZE ...]   # in benchmarks/; appends to results/strength_rounding.csv

The model has been fine-tuned for some steps. alpha is set in float32 for each displacement; with this alpha the whole
step is taken again in bfloat16: everything in bfloat16, or weights in float32 under autocast. The reference has the
same stored weights, so that only the arithmetic differs. `linear` is float32 against float32 at the first displacement
of the list: what a larger one costs before any rounding.

The regularizer runs at strength 1e4, where all but 1e-4 of what it returns is the consistency term's gradient.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from demo.train import Batch, Recipe, sft_loss
from torch import Tensor, nn

from lfu_reg import LfURegularizer
from strength import store
from strength.sizes import AUXILIARIES, SIZES, batches_of, starting_point

DISPLACEMENTS = (3e-3, 1e-2, 3e-2, 6e-2, 1e-3, 1e-1, 3e-1)
ALONE = 1e4  # the strength at which SFT's part is negligible
MODES = ("bfloat16", "autocast")
# Steps of SFT beforehand, then batches, samples and tokens that are measured on.
TUNED = {"0.8M": 10, "2.2M": 10, "135M": 3}
MEASURED_ON = {"0.8M": (4, 8, 160), "2.2M": (2, 4, 160), "135M": (1, 2, 64)}


def main(arguments: list[str] | None = None) -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=["2.2M", "135M"], help=f"of {', '.join(SIZES)}")
    parser.add_argument("--auxiliaries", nargs="+", default=AUXILIARIES, choices=AUXILIARIES)
    parser.add_argument("--displacements", nargs="+", type=float, default=DISPLACEMENTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for size in options.sizes:
        done = store.rows("rounding")
        model, batches = tuned(size)
        for auxiliary in options.auxiliaries:
            first: list[Tensor] = []
            guess: dict[int, float] = {}
            for displacement in options.displacements:
                key = {"size": size, "auxiliary": auxiliary, "displacement": displacement}
                if first and store.has(done, **key):
                    continue
                for row in measured(model, batches, auxiliary, displacement, first, guess):
                    if not store.has(done, **key):
                        store.append("rounding", {**key, **row})


def tuned(size: str) -> tuple[nn.Module, list[Batch]]:
    """A model after some steps of SFT, and batches that it has not seen."""
    model, steps = starting_point(size, 0), TUNED[size]
    count, samples, tokens = MEASURED_ON[size]
    every = batches_of(size, 0, Recipe(steps + count, samples, SIZES[size].recipe.lr, "lora", tokens))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=SIZES[size].recipe.lr)
    for _ in range(steps):
        sft_loss(model, next(every)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, list(every)


def measured(
    model: nn.Module,
    batches: list[Batch],
    auxiliary: str,
    displacement: float,
    first: list[Tensor],
    guess: dict[int, float],
) -> Iterator[dict[str, Any]]:
    """A row for each mode; `first` gets float32's gradients at the first displacement, `guess` the next alphas."""
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    stored = copy.deepcopy(rounded).to(torch.float32)
    found: dict[str, list[tuple[float, float, float, float]]] = {mode: [] for mode in MODES}
    alphas = []
    for number, batch in enumerate(batches):
        alpha, full = alpha_for(model, batch, auxiliary, displacement, guess.get(number, displacement))
        alphas.append(alpha)
        guess[number] = alpha * 3
        if len(first) == number:
            first.append(full.gradient)
        linear = cosine(full.gradient, first[number])
        low = Step(rounded, batch, auxiliary, alpha)
        exact = Step(stored, batch, auxiliary, alpha)
        found["bfloat16"].append((cosine(low.gradient, exact.gradient), low.value / exact.value, low.moved, linear))
        low = Step(model, batch, auxiliary, alpha, autocast=True)
        found["autocast"].append((cosine(low.gradient, full.gradient), low.value / full.value, low.moved, linear))
    for mode, values in found.items():
        means = [statistics.fmean(column) for column in zip(*values, strict=True)]
        names = ("cosine", "value", "measured", "linear")
        yield {
            "mode": mode,
            "alpha": statistics.fmean(alphas),
            **dict(zip(names, means, strict=True)),
            "worst": min(value[0] for value in values),
        }


class Step:
    """The consistency term's gradient as one vector, its value, and the displacement as it was measured."""

    def __init__(self, model: nn.Module, batch: Batch, auxiliary: str, alpha: float, *, autocast: bool = False) -> None:
        with LfURegularizer(model, auxiliary, alpha=alpha, strength=ALONE, seed=0) as reg:
            with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
                loss = reg(model, batch, sft_loss)
            loss.backward()
            self.value = float(reg.metrics["consistency_loss"])
            self.moved = float(reg.metrics["relative_distance"])
        self.gradient = torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])
        model.zero_grad(set_to_none=True)


def alpha_for(model: nn.Module, batch: Batch, auxiliary: str, displacement: float, alpha: float) -> tuple[float, Step]:
    """The alpha that moves hidden states so far in float32, to 3 %, from a guess; and the step there."""
    for _ in range(8):
        found = Step(model, batch, auxiliary, alpha)
        if abs(found.moved / displacement - 1) < 0.03:
            break
        alpha *= displacement / found.moved
    return alpha, found


def cosine(a: Tensor, b: Tensor) -> float:
    """In float64: near one, float32 rounds."""
    return float(torch.cosine_similarity(a.double(), b.double(), dim=0))


if __name__ == "__main__":
    main()
