"""Accelerate needs nothing but the one line: accumulation, clipping, bfloat16, checkpoints with the step count."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.utils.data import DataLoader

from lfu_reg import LfURegularizer
from tests.support.cases import plain_loss, seeded, token_batch
from tests.support.compare import assert_same_gradients, gradients_of
from tests.support.loops import STEERING, values
from tests.support.plain_models import TinyLM
from tests.support.snapshots import differing

BATCHES = [token_batch(seed) for seed in range(4)]


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def tiny(**changes: Any) -> Any:
    return seeded(lambda: TinyLM(**changes))


@pytest.mark.parametrize("attach", ["before prepare", "after prepare"])
def test_accumulated_step(attach: str) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    model, reference = tiny(), tiny()
    reg = LfURegularizer(model, **STEERING) if attach == "before prepare" else None
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(BATCHES, batch_size=None))
    reg = LfURegularizer(wrapped, **STEERING) if reg is None else reg
    before = values(model)
    for batch in loader:
        with accelerator.accumulate(wrapped):
            loss = reg(wrapped, batch, plain_loss)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(wrapped.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    reg.remove()
    with LfURegularizer(reference, **STEERING) as by_hand:
        for batch in BATCHES:
            (by_hand(reference, dict(batch), plain_loss) / 4).backward()
    assert float(norm) == pytest.approx(float(torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)), rel=1e-9)
    assert float(norm) > 0.5
    got = {name: before[name] - p.detach() for name, p in model.named_parameters()}
    assert_same_gradients(got, gradients_of(reference), 1e-9)


def test_bfloat16() -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model, reference = tiny().float(), tiny().float()
    wrapped = accelerator.prepare(model)
    with LfURegularizer(wrapped, **STEERING) as reg:
        accelerator.backward(reg(wrapped, BATCHES[0], plain_loss))
        assert reg.metrics["consistency_loss"] > 0

    def loss_in_bfloat16(model: Any, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch["input_ids"])
        return plain_loss(lambda _: logits.float(), batch)

    with LfURegularizer(reference, **STEERING) as reg:
        reg(reference, BATCHES[0], loss_in_bfloat16).backward()
    assert_same_gradients(gradients_of(model), gradients_of(reference), 1e-5)


def test_saved_state_resumes_exactly(tmp_path: Path) -> None:
    """LoRA's random directions and the schedule of lam go on from the step count."""
    lfu = {"auxiliary": "lora", "alpha": 0.05, "lam": lambda step: 0.5 / (1 + step)}

    def run(batches: list[Any], *, save: bool = False, load: bool = False) -> Any:
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(cpu=True)
        model = tiny(dropout=0.2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        model, optimizer = accelerator.prepare(model, optimizer)
        with LfURegularizer(model, **lfu, seed=9) as reg:
            accelerator.register_for_checkpointing(reg)
            if load:
                accelerator.load_state(str(tmp_path / "saved"))
            for batch in batches:
                accelerator.backward(reg(model, batch, plain_loss))
                optimizer.step()
                optimizer.zero_grad()
            if save:
                accelerator.save_state(str(tmp_path / "saved"))
        return model

    torch.manual_seed(1)
    whole = run(BATCHES)
    torch.manual_seed(1)
    run(BATCHES[:2], save=True)
    resumed = run(BATCHES[2:], load=True)
    assert not differing(values(resumed), values(whole))
