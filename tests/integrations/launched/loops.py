"""Runs in each of two processes: every loop has the gradients of one process with the whole batch.

    torchrun --standalone --nproc_per_node 2 -m tests.integrations.launched.loops trainer

The direction is fixed, as each process has an ascent direction of its own.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lfu_reg import LfURegularizer
from tests.support.compare import assert_same_gradients, gradients_of, mismatch
from tests.support.loops import FIXED, arguments, descended, tiny_llama, token_rows, values
from tests.support.snapshots import hook_counts

ROWS = token_rows(8)
KEYS = tuple(ROWS[0])


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {key: torch.tensor([row[key] for row in rows]) for key in KEYS}


def sft_loss(model: Any, batch: Any) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def reference(lam: float = FIXED["lam"]) -> dict[str, Any]:
    """All rows in one process."""
    model = tiny_llama()
    with LfURegularizer(model, **{**FIXED, "lam": lam}) as reg:
        reg(model, collate(ROWS), sft_loss).backward()
    return gradients_of(model)


def trainer(where: Path) -> tuple[dict[str, Any], nn.Module]:
    from lfu_reg.integrations.hf import LfUTrainer

    model = tiny_llama()
    args = arguments(where, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    before, hooks = values(model), hook_counts(model)
    one = LfUTrainer(model, args, train_dataset=ROWS, data_collator=collate, lfu=FIXED)
    one.train()
    assert isinstance(one.model_wrapped, nn.parallel.DistributedDataParallel)
    assert hook_counts(model) == hooks
    return descended(before, model), model


def sft(where: Path) -> tuple[dict[str, Any], nn.Module]:
    from datasets import Dataset
    from trl import SFTConfig

    from lfu_reg.integrations.trl import LfUSFTTrainer
    from tests.support.loops import quiet, word_tokenizer

    model = tiny_llama()
    config = SFTConfig(
        **quiet(where, per_device_train_batch_size=2, gradient_accumulation_steps=2),
        gradient_checkpointing=False,
        bf16=False,
    )
    before = values(model)
    data = Dataset.from_list([{key: row[key] for key in ("input_ids", "labels")} for row in ROWS])
    LfUSFTTrainer(model, config, train_dataset=data, processing_class=word_tokenizer(), lfu=FIXED).train()
    return descended(before, model), model


def accelerate(where: Path) -> tuple[dict[str, Any], nn.Module]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model: Any = tiny_llama()
    loader = DataLoader(ROWS, batch_size=2, collate_fn=collate)
    wrapped, loader = accelerator.prepare(model, loader)
    with LfURegularizer(model, **FIXED) as reg:
        for batch in loader:
            with accelerator.accumulate(wrapped):
                loss = reg(wrapped, batch, sft_loss)
                accelerator.backward(loss)
    assert isinstance(wrapped, nn.parallel.DistributedDataParallel)
    assert len(accelerator.gather(loss.detach()[None])) == 2
    return gradients_of(model), model


def lightning(where: Path) -> tuple[dict[str, Any], nn.Module]:
    import lightning.pytorch as L

    from lfu_reg.integrations.lightning import LfUCallback

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny_llama()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return sft_loss(self.model, batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1.0)

    module = Module()
    before = values(module.model)
    L.Trainer(
        default_root_dir=where,
        accelerator="cpu",
        strategy="ddp",
        devices=2,
        max_epochs=1,
        accumulate_grad_batches=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[LfUCallback(**FIXED)],
    ).fit(module, DataLoader(ROWS, batch_size=2, collate_fn=collate))
    return descended(before, module.model), module.model


LOOPS: dict[str, Callable[[Path], tuple[dict[str, Any], nn.Module]]] = {
    "trainer": trainer,
    "sft": sft,
    "accelerate": accelerate,
    "lightning": lightning,
}


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    want = reference()
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            got, model = LOOPS[name](Path(folder))
        assert dist.get_world_size() == 2
        assert_same_gradients(got, want, 1e-5)
        for parameter in model.parameters():
            both = [torch.empty_like(parameter) for _ in range(2)]
            dist.all_gather(both, parameter.detach())
            assert torch.equal(*both)
        sys.stdout.write(f"{name} has the right gradients in process {dist.get_rank()}\n")
        sys.stdout.flush()
    assert mismatch(reference(lam=0.0), want)[0] > 1e-2
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
