"""Fine-tuning: an ordinary loop, in which LfU is three lines."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lfu_reg.auxiliaries import AuxiliaryName
from lfu_reg.cli.compare.encoding import Tokens, collate
from lfu_reg.cli.compare.plan import ONE_BACKWARD, Run
from lfu_reg.cli.saved_bytes import SavedBytes
from lfu_reg.cli.timing import Clock
from lfu_reg.regularizer import LfURegularizer
from lfu_reg.step.settings import StrategyName

FIGURES = ("alpha", "lam", "gradient_ratio", "gradient_cosine", "relative_distance")


@dataclass
class Trained:
    """What was seen of a training.

    Attributes:
        losses: l_SFT of each step.
        seconds: of each step.
        peak_bytes: of a step above weights and optimizer: of the CUDA allocator, on CPU what autograd keeps.
        figures: means over the steps of what the regularizer reports.
        diverged: whether it ended early, at a loss that is no number.
    """

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    figures: dict[str, float] = field(default_factory=dict)
    diverged: bool = False


@contextmanager
def adapted(base: Any, seed: int) -> Iterator[Any]:
    """The base model with a fresh LoRA adapter of PEFT on all linear maps; it is as before afterwards."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    adapter = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, adapter)
    try:
        yield model
    finally:
        model.unload()
        base.requires_grad_(True).eval()


@contextmanager
def scaled(model: Any, factor: float) -> Iterator[None]:
    """The adapter multiplied by a factor (WiSE-FT, arXiv 2109.01903, from the base model to the tuned one)."""
    layers: list[Any] = [module for module in model.modules() if isinstance(getattr(module, "scaling", None), dict)]
    before = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            layer.scaling = {name: factor * value for name, value in layer.scaling.items()}
        yield
    finally:
        for layer, values in zip(layers, before, strict=True):
            layer.scaling = values


def batches(rows: Sequence[Tokens], size: int, steps: int, seed: int) -> list[list[Tokens]]:
    """Rows of each step: epochs over the rows, in a new order each time."""
    order = random.Random(seed)
    queue: list[Tokens] = []
    found: list[list[Tokens]] = []
    size = min(size, len(rows))
    for _ in range(steps):
        while len(queue) < size:
            queue += order.sample(rows, len(rows))
        found.append(queue[:size])
        del queue[:size]
    return found


def sft_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Negative log-likelihood per token of the answers."""
    loss: Tensor = model(**batch).loss
    return loss


def regularizer(model: nn.Module, run: Run, auxiliary: AuxiliaryName) -> LfURegularizer | None:
    """LfU of a run; None for plain SFT."""
    if run.step is None:
        return None
    strategy: StrategyName = "one-backward" if run.step == ONE_BACKWARD else "auto"
    return LfURegularizer(model, auxiliary, strength=run.strength, strategy=strategy, seed=run.seed)


def train(
    model: Any,
    run: Run,
    rows: Sequence[list[Tokens]],
    *,
    auxiliary: AuxiliaryName,
    pad: int,
    device: str,
    tick: Callable[[Run, float], object],
) -> Trained:
    """Train the adapter of a model on batches of rows; `tick` is told run and loss of each step."""
    seen, clock = Trained(), Clock(device)
    figures: dict[str, list[float]] = {}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=run.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(rows))
    model.train()
    reg = regularizer(model, run, auxiliary)
    for number, chosen in enumerate(rows):
        batch = collate(chosen, pad, device)
        # What autograd keeps is counted in the first step, whose time nobody should look at anyway.
        memory = _Peak(device) if number == 0 else nullcontext()
        start = clock.now()
        with memory:
            loss = reg(model, batch, sft_loss) if reg else sft_loss(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
        value = float(reg.metrics["sft_loss"] if reg else loss.detach())
        if not math.isfinite(value):
            seen.diverged = True
            break
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seen.seconds.append(clock.now() - start)
        seen.losses.append(value)
        if isinstance(memory, _Peak):
            seen.peak_bytes = memory.bytes
        for name in FIGURES:
            if reg and name in reg.metrics:
                figures.setdefault(name, []).append(float(reg.metrics[name]))
        tick(run, value)
    if reg:
        reg.remove()
    model.eval()
    seen.figures = {name: sum(values) / len(values) for name, values in figures.items()}
    return seen


class _Peak:
    """Context that measures `bytes`, the peak above what was there before."""

    def __init__(self, device: str) -> None:
        self.bytes = 0
        self._device = device
        self._saved = None if device.startswith("cuda") else SavedBytes()

    def __enter__(self) -> None:
        if self._saved is None:
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            self._saved.__enter__()

    def __exit__(self, *raised: Any) -> None:
        if self._saved is None:
            self.bytes = torch.cuda.max_memory_allocated(self._device) - self._before
        else:
            self._saved.__exit__(*raised)
            self.bytes = self._saved.peak
