"""One fine-tuning run of the protocol, on one device or on several under torchrun (FSDP2)."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from demo.data import collate, encode
from demo.skills import Example
from methods import METHODS
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, get_cosine_schedule_with_warmup

from paper.settings import Model, Protocol, Row


@dataclass(frozen=True)
class Place:
    """Where this process runs.

    Attributes:
        rank, processes: among those of torchrun; 0 and 1 without it.
        device: of this process.
    """

    rank: int
    processes: int
    device: torch.device


def place() -> Place:
    """The device of this process; joins the process group under torchrun."""
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if processes > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Place(rank, processes, device)


def settings_of(row: Row, model: Model, protocol: Protocol) -> dict[str, Any]:
    """The hyperparameters of a row: LfU takes alpha and lambda from the model."""
    settings = dict(row.settings)
    if row.method in ("lfu", "logit-kl"):
        values = model.steering() if settings.get("flavour") == "steering" else {"alpha": model.alpha, "lam": model.lam}
        settings = {**values, **settings, "seed": protocol.seed}
    return settings


def adapted(source: str, protocol: Protocol, where: Place, dtype: torch.dtype) -> nn.Module:
    """The base model with a LoRA adapter, sharded if there are several processes."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    model.config.use_cache = False
    torch.manual_seed(protocol.seed)
    adapter = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=protocol.rank,
        lora_alpha=protocol.lora_alpha,
        target_modules="all-linear",
    )
    model = get_peft_model(model, adapter).to(where.device)
    if where.processes > 1:
        from torch.distributed.fsdp import fully_shard

        # The adapter takes the dtype of the weights, as a sharded group must have one.
        model = model.to(dtype)
        for block in next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 1):
            fully_shard(block)
        fully_shard(model)
    return model.train()


def micro_batches(
    examples: list[Example], tokenizer: PreTrainedTokenizerBase, protocol: Protocol, where: Place, epoch: int
) -> Iterator[dict[str, Tensor]]:
    """This process's share of an epoch, shuffled; every process gets the same number."""
    order = list(range(len(examples)))
    random.Random(f"{protocol.seed} {epoch}").shuffle(order)
    size = protocol.batch_size * where.processes
    for start in range(0, len(order) - size + 1, size):
        mine = order[start + where.rank * protocol.batch_size :][: protocol.batch_size]
        rows = [encode(tokenizer, examples[i], protocol.max_length) for i in mine]
        yield collate(rows, tokenizer.pad_token_id, where.device)


def sft_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Negative log-likelihood of the response tokens."""
    loss: Tensor = model(**batch).loss
    return loss


def finetune(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
    row: Row,
    settings: dict[str, Any],
    protocol: Protocol,
    where: Place,
    max_steps: int | None = None,
) -> dict[str, float]:
    """Trains in place; returns figures of the training.

    Raises:
        ValueError: if there are fewer examples than one step takes.
    """
    steps_an_epoch = len(examples) // (protocol.batch_size * where.processes) // protocol.accumulate
    if steps_an_epoch < 1:
        needed = protocol.batch_size * where.processes * protocol.accumulate
        raise ValueError(f"{len(examples)} training examples; one optimizer step takes {needed}.")
    total = protocol.epochs * steps_an_epoch
    total = total if max_steps is None else min(total, max_steps)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=protocol.lr, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(protocol.warmup * total), total)
    method = METHODS["sft" if row.method == "sdft" else row.method](model, **settings)
    torch.manual_seed(protocol.seed + where.rank)
    losses: list[Tensor] = []
    step, bar = 0, tqdm(total=total, desc=row.label, unit="step", disable=where.rank > 0, dynamic_ncols=True)
    for epoch in range(protocol.epochs):
        for number, batch in enumerate(micro_batches(examples, tokenizer, protocol, where, epoch), start=1):
            loss = method(model, batch, sft_loss)
            (loss / protocol.accumulate).backward()
            losses.append(loss.detach())
            if number % protocol.accumulate:
                continue
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            method.after_step()
            step += 1
            bar.update()
            if step == total:
                break
        else:
            optimizer.zero_grad()  # what is left of an epoch is too little for a step
            continue
        break
    bar.close()
    method.finish()
    last = losses[-max(1, len(losses) // 10) :]
    return {"steps": step, "final_loss": float(torch.stack(last).mean())}
