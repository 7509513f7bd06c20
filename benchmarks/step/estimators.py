"""Bias and variance of cheaper estimates of the consistency term's gradient, against the exact one.

    python -m step.estimators   # in benchmarks/; writes results/estimators.csv, about two minutes on one thread

The demo's model (trained weights, 4 layers) is fine-tuned in full on its new format for some steps; there the gradient
of l_cons alone is taken exactly and by every estimator, for theta_aux = steering vectors and weights.

Every estimate that leaves out samples, tokens or layers of pass 2 is the exact term with other weights on the pairs
(layer, position), so a distance with given weights measures them all.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from demo.data import collate, encode
from demo.load import EMBEDDED_MODEL, load_model
from demo.skills import new_format_examples
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from tqdm import tqdm

from lfu_reg import Distance, LfURegularizer, SteeringVectors, WeightDeltas

OUT = Path(__file__).resolve().parents[1] / "results" / "estimators.csv"
ALPHA = {"steering": 0.1, "weights": 0.03}
BATCH, STEPS, LAYERS = 16, 16, 4
LAM = 1e3  # large, so that little is lost when the SFT gradient is taken off again
Batch = dict[str, Tensor]
T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One line of the result.

    Attributes:
        auxiliary: theta_aux.
        estimator: what is left out.
        cost: part of pass 2 and its backward that is left, on average.
        bias: ||mean of the estimates - exact|| / ||exact||.
        noise: of `bias`: what it would be on average without any, from the spread and the number of draws.
        spread: root mean square distance of an estimate from their mean, over ||exact||.
        cosine: mean cosine of estimate and exact gradient.
        draws: number of estimates; all outcomes of a uniform draw where there are few, so that nothing is noise.
    """

    auxiliary: str
    estimator: str
    cost: float
    bias: float
    noise: float
    spread: float
    cosine: float
    draws: int


class Weighted(Distance):
    """The squared distance with a weight for every layer and position.

    Args:
        weights: [layers, positions].
    """

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights

    def __call__(self, clean, perturbed, token_index, reduction):
        terms = [
            (w * (p - c).square().mean(-1).flatten()).sum()
            for w, c, p in zip(self.weights, clean, perturbed, strict=True)
        ]
        per_layer = torch.stack(terms)
        return per_layer.sum(), per_layer.detach()


class Stale:
    """Mixin for an auxiliary whose ascent goes along the gradient of an earlier step.

    Attributes:
        earlier: that gradient; None takes the present one.
        present: the gradient of the last step.
    """

    earlier = present = None

    def ascend(self, alpha: float) -> Tensor:
        self.present = self._gradients
        if self.earlier is not None:
            self._gradients = self.earlier
        return super().ascend(alpha)


class StaleSteering(Stale, SteeringVectors):
    """Steering vectors, possibly along an earlier gradient."""


class StaleWeights(Stale, WeightDeltas):
    """The weights, possibly along an earlier gradient."""


STALE = {"steering": StaleSteering, "weights": StaleWeights}


def main(arguments: list[str] | None = None) -> None:
    """Measure all and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=16, help="estimates by each random estimator")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    with tqdm(total=2 * (4 * options.draws + 2 * STEPS + 40), desc="estimates", leave=False) as bar:
        for auxiliary in ALPHA:
            for measured in (of_one_step, over_steps):
                rows += list(measured(auxiliary, options.draws, bar.update))
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(Row.__dataclass_fields__))
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in asdict(row).items()} for row in rows)
    print(f"written to {options.out}")


def of_one_step(auxiliary: str, draws: int, tick: Callable[[], object]) -> Iterator[Row]:
    """Estimators that leave out a part of pass 2."""
    model, batches = tuned_model(), some_batches()
    for _ in range(8):
        train_step(model, next(batches))
    batch = next(batches)
    kept = (batch["labels"] != -100).flatten()
    samples, tokens = batch["labels"].shape
    sample = torch.arange(samples).repeat_interleave(tokens)
    place = torch.arange(tokens).repeat(samples)
    even = (kept / (LAYERS * kept.sum())).expand(LAYERS, -1)
    layer = torch.arange(LAYERS)[:, None]
    generator = torch.Generator().manual_seed(0)
    plain = vector_of(model, sft_loss(model, batch))
    exact = gradient(model, batch, auxiliary, even, plain=plain)

    def part_of_samples(number: int) -> Tensor:
        chosen = torch.randperm(samples, generator=generator)[:number]
        return even * torch.isin(sample, chosen) * (samples / number)

    def watched(draws: Iterable[T]) -> Iterator[T]:
        for draw in draws:
            yield draw
            tick()

    def up_to(length: int) -> Tensor:
        return even * (place < length) * tokens / (tokens - place)  # P(place < length) = (tokens - place) / tokens

    def down_to(depth: int) -> Tensor:
        return even * (layer < depth) * LAYERS / (LAYERS - layer)

    def first_layers(number: int) -> Tensor:
        return even * (layer < number) * (LAYERS / number)

    cases: list[tuple[str, float, list[Tensor]]] = [
        *(
            (f"batch_fraction={1 / d:g}", 1 / d, [part_of_samples(samples // d) for _ in range(draws)])
            for d in (2, 4, 8)
        ),
        ("random depth, weighted", (LAYERS + 1) / (2 * LAYERS), [down_to(d) for d in range(1, LAYERS + 1)]),
        ("random prefix, weighted", (tokens + 1) / (2 * tokens), [up_to(n) for n in range(1, tokens + 1)]),
        ("first half of the layers", 0.5, [first_layers(LAYERS // 2)]),
        ("first layer of four", 0.25, [first_layers(1)]),
    ]
    for name, cost, weights in cases:
        estimates = [gradient(model, batch, auxiliary, w, plain=plain) for w in watched(weights)]
        yield compared(auxiliary, name, cost, estimates, exact)
    # Through the library's own option: the same as the weights above, if both are right.
    options = {"plain": plain, "batch_fraction": 0.5}
    estimates = [gradient(model, batch, auxiliary, None, seed=s, **options) for s in watched(range(draws))]
    yield compared(auxiliary, "batch_fraction=0.5, the library's", 0.5, estimates, exact)
    if auxiliary == "steering":  # its last two of four layers, of which one runs twice
        late = gradient(model, batch, auxiliary, None, plain=plain, layers="late")
        yield compared(auxiliary, "layers='late', the library's", 1 / LAYERS, [late], exact)
    # Response tokens come last, so that a prefix holds few of them or none: it is compared where every token counts.
    everywhere = batch["attention_mask"].flatten() / (LAYERS * batch["attention_mask"].sum())
    options = {"plain": plain, "token_mask": batch["attention_mask"]}
    whole = gradient(model, batch, auxiliary, everywhere.expand(LAYERS, -1), **options)
    inside = everywhere * (place < tokens // 2)
    half = gradient(model, batch, auxiliary, (inside / inside.sum() / LAYERS).expand(LAYERS, -1), **options)
    yield compared(auxiliary, "prefix: half of the positions, all tokens count", 0.5, [half], whole)


def over_steps(auxiliary: str, draws: int, tick: Callable[[], object]) -> Iterator[Row]:
    """Estimators that leave out steps, or take the direction from another step."""
    model, batches = tuned_model(), some_batches()
    for _ in range(8):
        train_step(model, next(batches))
    exact, stale, earlier = [], [], None
    for _ in range(STEPS):
        batch = next(batches)
        aux = STALE[auxiliary]()
        exact.append(gradient(model, batch, aux, None, alpha=ALPHA[auxiliary]))
        present = aux.present
        if earlier is not None:
            aux = STALE[auxiliary]()
            aux.earlier = earlier
            stale.append(gradient(model, batch, aux, None, alpha=ALPHA[auxiliary]))
        earlier = present
        train_step(model, batch)
        tick()
    yield compared(auxiliary, "direction of the step before", 1.0, stale, exact[1:])
    for k in (2, 4):
        windows = [torch.stack(exact[i : i + k]) for i in range(0, STEPS, k)]
        sums = [window.sum(0) for window in windows for _ in range(k)]
        yield compared(auxiliary, f"every={k}, lam times {k}", 1 / k, [k * g for w in windows for g in w], sums)
    # Micro-batches of one step: the weights stay, the direction is the first one's.
    micro = [next(batches) for _ in range(4)]
    first = STALE[auxiliary]()
    whole = [gradient(model, micro[0], first, None, alpha=ALPHA[auxiliary])]
    shared, earlier = [whole[0]], first.present
    for batch in micro[1:]:
        whole.append(gradient(model, batch, auxiliary, None))
        aux = STALE[auxiliary]()
        aux.earlier = earlier
        shared.append(gradient(model, batch, aux, None, alpha=ALPHA[auxiliary]))
    yield compared(
        auxiliary,
        "accumulation: the first micro-batch's direction for all four",
        1.0,
        [torch.stack(shared).sum(0)],
        [torch.stack(whole).sum(0)],
    )


def compared(auxiliary: str, name: str, cost: float, estimates: list[Tensor], exact: list[Tensor] | Tensor) -> Row:
    """Estimates against exact gradients, pair by pair, or against a single one."""
    drawn = "weighted" not in name
    exact = [exact] * len(estimates) if isinstance(exact, Tensor) else exact
    errors = torch.stack([e - x for e, x in zip(estimates, exact, strict=True)])
    size = torch.stack([x.norm() for x in exact]).square().mean().sqrt()
    mean = errors.mean(0)
    spread = (errors - mean).square().sum(1).mean().sqrt()
    cosines = [torch.cosine_similarity(e, x, dim=0) for e, x in zip(estimates, exact, strict=True)]
    return Row(
        auxiliary,
        name,
        round(cost, 3),
        float(mean.norm() / size),
        float(spread / size / max(len(estimates) - 1, 1) ** 0.5) if drawn else 0.0,
        float(spread / size),
        float(torch.stack(cosines).mean()),
        len(estimates),
    )


def gradient(
    model: nn.Module, batch: Batch, auxiliary, weights: Tensor | None, *, plain=None, seed=0, alpha=None, **options
) -> Tensor:
    """The gradient of l_cons with respect to all weights, as one vector."""
    distance = "mse" if weights is None else Weighted(weights)
    alpha = ALPHA[auxiliary] if alpha is None else alpha
    plain = vector_of(model, sft_loss(model, batch)) if plain is None else plain
    with LfURegularizer(model, auxiliary, alpha=alpha, lam=LAM, distance=distance, seed=seed, **options) as reg:
        return (vector_of(model, reg(model, batch, sft_loss)) - plain) / LAM


def vector_of(model: nn.Module, loss: Tensor) -> Tensor:
    """The gradient of a loss as one vector."""
    loss.backward()
    result = parameters_to_vector([p.grad for p in model.parameters()]).clone()
    model.zero_grad(set_to_none=True)
    return result


def sft_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Of the response tokens."""
    return model(**batch).loss


def train_step(model: nn.Module, batch: Batch, lr: float = 0.05) -> None:
    """One step of plain gradient descent on the SFT loss."""
    sft_loss(model, batch).backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= lr * p.grad
    model.zero_grad(set_to_none=True)


def tuned_model() -> nn.Module:
    """The embedded model."""
    model, _ = load_model(str(EMBEDDED_MODEL), torch.device("cpu"), torch.float32)
    model.config.use_cache = False
    return model.train()


def some_batches() -> Iterator[Batch]:
    """Batches of the demo's new format, in an order of their own."""
    _, tokenizer = load_model(str(EMBEDDED_MODEL), torch.device("cpu"), torch.float32)
    examples = new_format_examples(128, seed=0)
    order = torch.Generator().manual_seed(1)
    while True:
        chosen = torch.randperm(len(examples), generator=order)[:BATCH]
        rows = [encode(tokenizer, examples[i], 128) for i in chosen]
        yield collate(rows, tokenizer.pad_token_id, torch.device("cpu"))


if __name__ == "__main__":
    main()
