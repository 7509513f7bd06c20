"""One fine-tuning run of the protocol, on one device or on several under torchrun (FSDP2)."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from demo.skills import Example
from methods import METHODS, Method
from methods.base import IGNORED, Batch, LossFunction
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, get_cosine_schedule_with_warmup

from lfu_reg import LfURegularizer, LoRADeltas, SteeringVectors, WeightDeltas
from paper.data import batch_of, micro_batches, second_loader, updates
from paper.published_lora import PublishedLoRA
from paper.published_steering import PublishedSteering
from paper.settings import STEERING, Model, Protocol
from paper.states import names_of
from paper.tables import Row

_WARM_UP_STEPS = 2  # not counted in the time of a step


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


def adapted(source: str, protocol: Protocol, where: Place, dtype: torch.dtype) -> nn.Module:
    """The base model with a LoRA adapter, sharded if there are several processes.

    Raises:
        ValueError: for what several processes cannot do.
    """
    if where.processes > 1 and protocol.checkpointing == "unmoved":
        raise ValueError("checkpointing=unmoved cannot move weights that are sharded: --switch checkpointing=exact.")
    if where.processes > 1 and protocol.float32_adapters and dtype != torch.float32:
        raise ValueError(
            f"float32 adapters on a base in {dtype}: FSDP2 shards weights of one dtype together. In several processes "
            "give --switch float32_adapters=false or --dtype float32."
        )
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    if protocol.checkpointing != "off":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(protocol.seed)
    adapter = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=protocol.rank,
        lora_alpha=protocol.lora_alpha,
        target_modules="all-linear",
    )
    model = get_peft_model(model, adapter, autocast_adapter_dtype=protocol.float32_adapters).to(where.device)
    if where.processes > 1:
        from torch.distributed.fsdp import fully_shard

        for block in next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 1):
            fully_shard(block)
        fully_shard(model)
    return model.train()


def settings_of(row: Row, model: Model) -> dict[str, float]:
    """alpha and lambda of a row of LfU, or of SAM's step: the row's own, else the model's."""
    own = STEERING if row.method == "lfu-steering" else {"alpha": model.alpha, "lam": model.lam}
    used = ("alpha",) if row.method == "sam" else ("alpha", "lam")
    return {name: float(row.settings.get(name, own[name])) for name in used}


class FromRegularizer(Method):
    """LfURegularizer, its direction from the batch itself or from `others`."""

    def __init__(self, model: nn.Module, others: Iterator[Batch] | None, *args: Any, **options: Any) -> None:
        super().__init__(model)
        self.reg, self.others = LfURegularizer(model, *args, **options), others

    def __call__(self, model: nn.Module, batch: Batch, sft_loss_fn: LossFunction) -> Tensor:
        """l_SFT + lam * l_cons."""
        return self.reg(model, batch, sft_loss_fn, undesirable=None if self.others is None else next(self.others))

    def finish(self) -> None:
        """Hooks off."""
        self.reg.remove()


def method_of(row: Row, model: nn.Module, known: Model, protocol: Protocol, others: Iterator[Batch]) -> Method:
    """What takes the place of the loss function in a row."""
    if row.method == "sam":
        return METHODS["sam"](model, rho=settings_of(row, known)["alpha"])
    if row.method not in ("lfu", "logit-kl", "lfu-steering"):
        return METHODS["sft" if row.method == "sdft" else row.method](model, **row.settings)
    states, strength = names_of(model, protocol.states, row.settings.get("layers", "all")), settings_of(row, known)
    if row.method == "lfu-steering" and protocol.steering == "as-published":
        return PublishedSteering(model, others, states, **strength, lr=protocol.lr, seed=protocol.seed)
    source = others if protocol.direction == "second-loader" else None
    if row.method == "lfu-steering":
        # Eq. 5 has a vector per layer that it compares.
        blocks = names_of(model, "blocks", row.settings.get("layers", "all"))
        return FromRegularizer(model, source, SteeringVectors(), layers=blocks, seed=protocol.seed, **strength)
    if row.method == "lfu" and protocol.lora == "adapter" and protocol.checkpointing == "unmoved":
        return PublishedLoRA(model, source, states, **strength)
    auxiliary = WeightDeltas() if protocol.lora == "adapter" else LoRADeltas(rank=protocol.rank)
    options = {"distance": "logit_kl"} if row.method == "logit-kl" else {}
    return FromRegularizer(model, source, auxiliary, layers=states, seed=protocol.seed, **strength, **options)


def counted(row: Row, batch: Batch) -> int:
    """How many tokens the loss of a batch covers."""
    covered = batch["attention_mask"] if row.method == "im" else batch["labels"] != IGNORED
    return int((covered[:, 1:] != 0).sum())


def token_loss(model: nn.Module, batch: Batch, tokens: float | None = None) -> Tensor:
    """Negative log-likelihood of the labels, divided by `tokens`, or by how many there are."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labels = batch["labels"][:, 1:]
    total = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / (max(int((labels != IGNORED).sum()), 1) if tokens is None else tokens)


def micro_loss(method: Method, row: Row, batch: Batch, mean_tokens: float | None) -> Tensor:
    """The loss of one micro-batch; the mean of these is the loss of the update.

    Args:
        method: of the row.
        row: what is run.
        batch: the micro-batch.
        mean_tokens: how many tokens a micro-batch of this update has on average: dividing each one's sum by it makes
            their mean the mean over tokens. None for the mean of micro-batch means. Terms that a method adds to
            l_SFT have the same weight in every micro-batch either way.
    """
    loss = method(method.model, batch, lambda model, data: token_loss(model, data, mean_tokens))
    if row.method == "gem" and mean_tokens is not None:
        return loss * (counted(row, batch) / mean_tokens)  # GEM takes a mean of its own in place of the loss function's
    return loss


def finetune(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
    row: Row,
    known: Model,
    protocol: Protocol,
    where: Place,
    max_steps: int | None = None,
) -> dict[str, float]:
    """Trains in place; returns figures of the training.

    Raises:
        ValueError: if there are fewer examples than one step takes.
    """
    share = (where.rank, where.processes)
    plan = [
        step
        for epoch in range(protocol.epochs)
        for step in updates(micro_batches(len(examples), protocol, f"epoch {epoch}", *share), protocol)
    ]
    if not plan:
        needed = protocol.batch_size * where.processes * protocol.accumulate
        raise ValueError(f"{len(examples)} training examples; one optimizer step takes {needed}.")
    plan = plan[:max_steps]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=protocol.lr, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(protocol.warmup * len(plan)), len(plan))
    others = second_loader(examples, tokenizer, protocol, where.device, *share)
    method = method_of(row, model, known, protocol, others)
    torch.manual_seed(protocol.seed + where.rank)
    losses, times = [], []
    low = any(p.dtype == torch.bfloat16 for p in model.parameters())
    bar = tqdm(plan, desc=row.label, unit="step", disable=where.rank > 0 or None, dynamic_ncols=True)
    for step in bar:
        started = _now(where)
        batches = [batch_of([examples[i] for i in chosen], tokenizer, protocol, where.device) for chosen in step]
        mean_tokens = _mean_tokens([counted(row, b) for b in batches], where) if protocol.token_mean else None
        total = 0.0
        for batch in batches:
            with torch.autocast(where.device.type, torch.bfloat16, enabled=low):
                loss = micro_loss(method, row, batch, mean_tokens) / len(batches)
            loss.backward()
            total += float(_mean_over_processes(loss.detach(), where))
        if protocol.clip:
            nn.utils.clip_grad_norm_(parameters, protocol.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        method.after_step()
        losses.append(total)
        times.append(1e3 * (_now(where) - started))
    method.finish()
    timed = times[_WARM_UP_STEPS:] or times
    return {
        "steps": len(plan),
        "first_loss": losses[0],
        "final_loss": statistics.fmean(losses[-max(1, len(losses) // 10) :]),
        "ms_per_step": statistics.fmean(timed),
        "ms_sd": statistics.pstdev(timed),
    }


def _mean_tokens(counts: list[int], where: Place) -> float:
    own = torch.tensor(counts, dtype=torch.float64, device=where.device).mean()
    return max(float(_mean_over_processes(own, where)), 1.0)  # every process has as many micro-batches


def _mean_over_processes(value: Tensor, where: Place) -> Tensor:
    if where.processes > 1:
        dist.all_reduce(value)
    return value / where.processes


def _now(where: Place) -> float:
    if where.device.type == "cuda":
        torch.cuda.synchronize(where.device)
    return time.perf_counter()
