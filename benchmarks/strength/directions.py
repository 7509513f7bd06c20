"""How near a step of one backward comes to the exact one, by where its direction is from.

    python -m strength.directions   # in benchmarks/; appends to results/strength_directions.csv

The 2.2 M model is tuned on GSM8K by steps of one backward at strength 1. At some steps the gradient of l_cons is taken
exactly, and with every other direction; a row has the cosine of the two. All but "exact, through the clean pass" and
"built in" go through the perturbed pass, so that they differ by the direction alone.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from demo.train import Batch, Recipe, make_optimizer, sft_loss
from torch import Tensor, nn

from lfu_reg import Auxiliary, LfURegularizer, LoRADeltas, SteeringVectors, WeightDeltas
from strength import store
from strength.sizes import AUXILIARIES, SIZES, batches_of, starting_point

MODEL, ALONE = "2.2M", 1e4
Direction = Mapping[str, Tensor]
SETTINGS = ((8, 13), (8, 41), (16, 13), (32, 13))  # batch, step
MEASURED, BEFORE = 3, 3  # steps that are measured in a row, and exact directions kept before them


class Told:
    """Mixin for an auxiliary that may be told its direction, and remembers the one that it found."""

    told: Direction | None = None
    found: Direction

    def ascend(self, alpha: float) -> Tensor:
        if alpha:
            self.replace_gradients(self._exchange)  # type: ignore[attr-defined]
        result: Tensor = super().ascend(alpha)  # type: ignore[misc]
        return result

    def _exchange(self, gradients: Direction) -> Direction:
        self.found = {name: gradient.clone() for name, gradient in gradients.items()}
        return gradients if self.told is None else self.told


class ToldSteering(Told, SteeringVectors):
    """Steering vectors."""


class ToldLoRA(Told, LoRADeltas):
    """LoRA deltas."""


class ToldWeights(Told, WeightDeltas):
    """The weights."""


TOLD = {"steering": ToldSteering, "lora": ToldLoRA, "weights": ToldWeights}


def main(arguments: list[str] | None = None) -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for size, step in SETTINGS:
        for auxiliary in AUXILIARIES:
            if not store.has(store.rows("directions"), auxiliary=auxiliary, batch=size, step=step):
                for name, values in cosines(auxiliary, size, step).items():
                    row = {"auxiliary": auxiliary, "batch": size, "step": step, "direction": name}
                    store.append("directions", {**row, "cosine": statistics.fmean(values), "draws": len(values)})


def cosines(auxiliary: str, size: int, start: int) -> dict[str, list[float]]:
    """Of every direction, at the steps with LfU among `MEASURED` ones from `start` on."""
    model, twin = (starting_point(MODEL, 0) for _ in range(2))
    recipe = Recipe(start + MEASURED, size, SIZES[MODEL].recipe.lr, "lora", 64)
    optimizer, found, earlier = make_optimizer(model, recipe.lr), {}, []
    with LfURegularizer(model, auxiliary, strength=1.0, strategy="one-backward", seed=0) as reg:
        for number, batch in enumerate(batches_of(MODEL, 0, recipe)):
            reg(model, batch, sft_loss).backward()
            if number >= start - BEFORE:
                twin.load_state_dict(model.state_dict())
                aux, alpha = TOLD[auxiliary](), float(reg.metrics["alpha"])
                exact = gradient(twin, batch, aux, alpha)
                own = aux.found
                if number >= start and number % 2:  # the others are plain
                    told = {f"exact, {len(earlier) - i} steps before": g for i, g in enumerate(earlier)}
                    for name, direction in told.items():
                        aux = TOLD[auxiliary]()
                        aux.told = direction
                        note(found, name, exact, gradient(twin, batch, aux, alpha))
                    for part in (1, 2, 4):
                        few = {key: value[: size * part // 8] for key, value in batch.items()}
                        estimate = gradient(twin, batch, TOLD[auxiliary](), alpha, undesirable=few)
                        note(found, f"{part} of 8 samples", exact, estimate)
                    note(
                        found, "exact, through the clean pass", exact, through_clean(twin, batch, auxiliary, alpha, own)
                    )
                    built_in = reg._progress.direction._mean
                    note(found, "built in", exact, through_clean(twin, batch, auxiliary, alpha, built_in))
                earlier = [*earlier, own][-BEFORE:]
            optimizer.step()
            optimizer.zero_grad()
    return found


def note(found: dict[str, list[float]], name: str, exact: Tensor, estimate: Tensor) -> None:
    """Add a cosine."""
    found.setdefault(name, []).append(float(torch.cosine_similarity(exact.double(), estimate.double(), dim=0)))


def gradient(model: nn.Module, batch: Batch, auxiliary: Auxiliary, alpha: float, **options: Any) -> Tensor:
    """Of l_cons as good as alone, by the exact step."""
    with LfURegularizer(model, auxiliary, alpha=alpha, strength=ALONE, seed=0) as reg:
        return vector(model, reg(model, batch, sft_loss, **options))


def through_clean(model: nn.Module, batch: Batch, auxiliary: str, alpha: float, direction: Direction) -> Tensor:
    """The same by a step of one backward that is told its direction."""
    with LfURegularizer(model, auxiliary, alpha=alpha, strength=ALONE, strategy="one-backward", seed=0) as reg:
        reg(model, batch, sft_loss)  # the first one only brings a direction
        reg._progress.direction._mean, reg._progress.direction.is_new = dict(direction), True
        return vector(model, reg(model, batch, sft_loss))


def vector(model: nn.Module, loss: Tensor) -> Tensor:
    """The gradient as one vector."""
    loss.backward()
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return found


if __name__ == "__main__":
    main()
