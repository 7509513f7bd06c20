"""How much disk, memory and time a table takes, said before anything is loaded."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from paper.settings import Protocol, Table

# Bytes that a block keeps per token for its backward, in units of (hidden size x bytes per number). Counted on a Llama
# block with LoRA on all linear maps: norms, projections, attention, MLP and adapters.
_SAVED_PER_TOKEN = 34
_COST_OF_LFU = 2.0  # steps of SFT


@dataclass(frozen=True)
class Needs:
    """In bytes and seconds.

    Attributes:
        parameters: of the model.
        disk: for the weights and the adapters of all runs.
        memory: per process, at the peak of training.
        seconds: of training, for all rows; None where the speed of the device was not measured.
    """

    parameters: int
    disk: int
    memory: int
    seconds: float | None

    def __str__(self) -> str:
        hours = (
            "unknown" if self.seconds is None else f"about {self.seconds / 3600:.1f} h of training on one such device"
        )
        return (
            f"{self.parameters / 1e9:.2f} G parameters; disk {self.disk / 1e9:.1f} GB; memory {self.memory / 1e9:.1f} "
            f"GB a process; time {hours}, evaluation not counted"
        )


def needs_of(
    source: str, table: Table, protocol: Protocol, examples: int, tokens: int, processes: int, flops: float | None
) -> Needs:
    """An estimate from the model's configuration alone.

    Args:
        source: folder or hub name.
        table: what is to be run.
        protocol: how.
        examples: number of training examples of all data sets of the table together.
        tokens: mean length of an example.
        processes: over which FSDP2 shards the weights.
        flops: of the device, per second; None if unknown.
    """
    config: PretrainedConfig = AutoConfig.from_pretrained(source)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parameters = sum(p.numel() for p in model.parameters())
    adapter = sum(
        protocol.rank * (m.in_features + m.out_features)
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and "lm_head" not in name
    )
    hidden, layers = config.hidden_size, config.num_hidden_layers
    batch_tokens = protocol.batch_size * min(tokens * 2, protocol.max_length)  # the longest batch
    activations = batch_tokens * hidden * layers * _SAVED_PER_TOKEN * 2
    logits = batch_tokens * config.vocab_size * 4 * 2
    states = batch_tokens * hidden * layers * 2
    memory = 2 * parameters // processes + adapter * 16 + activations + logits + states
    rows = [_COST_OF_LFU if row.method in ("lfu", "logit-kl", "sam", "r-drop") else 1.0 for row in table.rows]
    # Forward 2, backward to activations 2 FLOPs a parameter and token: frozen weights need no gradient.
    work = 4 * parameters * tokens * examples * protocol.epochs * sum(rows)
    disk = 2 * parameters + adapter * 4 * len(table.rows) * len(table.data)
    return Needs(parameters, disk, memory, None if flops is None else work / flops)


def measured_flops(device: torch.device, dtype: torch.dtype = torch.bfloat16, size: int = 2048) -> float:
    """Half of what a large matrix product reaches on the device: training steps reach less than products alone."""
    size = size if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    a @ b
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(10):
        a @ b
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 0.5 * 10 * 2 * size**3 / (time.perf_counter() - started)
