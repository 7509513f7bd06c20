"""The training loop behind the demo's model and that of the evidence, and its options."""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from demo.muon import Muon


def parse(argv: list[str] | None, description: str, **defaults: Any) -> argparse.Namespace:
    """The options of a run: steps, batch_size, lr, log_every and out, and the number of threads, which is set."""
    parser = argparse.ArgumentParser(description=description.strip())
    for name, default in {"seed": 0, "threads": 1, **defaults}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    return args


def train(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    args: argparse.Namespace,
    accuracies: Callable[[int], dict[str, float]],
) -> None:
    """Trains and writes the log of the run, one JSON object a line, into the folder `args.out`.

    Args:
        model: returns its loss.
        batches: at least `args.steps` of them.
        args: as `parse` gives them.
        accuracies: by skill, on that many held-out items of each.
    """
    args.out.mkdir(parents=True, exist_ok=True)
    optimizers = make_optimizers(model, args.lr, args.steps)
    started, losses, tokens = time.perf_counter(), [], 0
    with (args.out / "pretrain_log.jsonl").open("w", encoding="utf-8") as log:

        def write(**entry: Any) -> None:
            log.write(json.dumps(entry) + "\n")
            log.flush()

        write(
            event="start",
            parameters=sum(p.numel() for p in model.parameters()),
            settings={key: value for key, value in vars(args).items() if key != "out"},
            torch=torch.__version__,
            python=platform.python_version(),
        )
        bar = tqdm(range(1, args.steps + 1), desc="pretraining", unit="step")
        for step, batch in zip(bar, batches, strict=False):
            loss = model(**batch).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, schedule in optimizers:
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            losses.append(float(loss.detach()))
            tokens += int(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum())
            if step % args.log_every == 0 or step == args.steps:
                accuracy = accuracies(1000 if step == args.steps else 100)
                write(
                    event="end" if step == args.steps else "progress",
                    step=step,
                    seconds=round(time.perf_counter() - started, 1),
                    examples=step * args.batch_size,
                    tokens=tokens,
                    loss=round(sum(losses) / len(losses), 5),
                    validation_accuracy={name: round(value, 4) for name, value in accuracy.items()},
                )
                losses.clear()
                bar.set_postfix_str(" ".join(f"{name} {value:.2f}" for name, value in accuracy.items()))


def make_optimizers(model: nn.Module, lr: float, steps: int) -> list[tuple[Optimizer, LambdaLR]]:
    """Muon for the hidden layers' matrices, AdamW for embeddings and norms; warm-up, then linear decay."""

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / 100) * (1 - step / (steps + 1))

    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [Muon(hidden, lr), torch.optim.AdamW(others, lr / 2, betas=(0.9, 0.98), weight_decay=0.0)]
    return [(optimizer, LambdaLR(optimizer, factor)) for optimizer in optimizers]
