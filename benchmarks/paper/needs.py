"""How much disk, memory and time a table takes, said before anything is loaded."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from paper.settings import Protocol
from paper.tables import Row
from paper.tasks import ELEVEN, SIZES

# Bytes that a block keeps per token for its backward, in units of (hidden size x bytes per number). Counted on a Llama
# block with LoRA on all linear maps: norms, projections, attention, MLP and adapters.
_SAVED_PER_TOKEN = 34
# Steps of SFT that a step costs; LfU with a second loader has a forward and a backward on the other batch as well.
_COST = {"vanilla": 0.0, "lfu": 2.0, "lfu-steering": 2.0, "logit-kl": 2.0, "sam": 2.0}
_SECOND_LOADER = 1.0
# Of what large matrix products reach. Table 3's 1387 ms for 16 samples of GSM8K are 1.1e14 FLOP/s by the count below,
# on a GPU whose products reach about 6e14.
_REACHED = 0.2


@dataclass(frozen=True)
class Needs:
    """In bytes and seconds.

    Attributes:
        parameters: of the model.
        disk: for the weights.
        memory: per process, at the peak of training.
        training, evaluation: of all rows; None where the speed of the device was not measured.
    """

    parameters: int
    disk: int
    memory: int
    training: float | None
    evaluation: float | None

    def __str__(self) -> str:
        if self.training is None or self.evaluation is None:
            hours = "time unknown"
        else:
            hours = f"about {self.training / 3600:.1f} h of training and {self.evaluation / 3600:.1f} h of evaluation"
        return (
            f"{self.parameters / 1e9:.2f} G parameters; disk {self.disk / 1e9:.1f} GB; memory {self.memory / 1e9:.1f} "
            f"GB a process; {hours} on one such device"
        )


def training_steps_of_sft(row: Row, protocol: Protocol) -> float:
    """What a step of the row costs, in steps of SFT."""
    cost = _COST.get(row.method, 1.0)
    published_steering = row.method == "lfu-steering" and protocol.steering == "as-published"
    other_batch = row.method in ("lfu", "lfu-steering", "logit-kl") and protocol.direction == "second-loader"
    # The published steering procedure has its pass on the other batch in the place of pass 2.
    return cost + _SECOND_LOADER * (other_batch and not published_steering)


def needs_of(
    source: str,
    rows: list[Row],
    protocol: Protocol,
    *,
    examples: int,
    tokens: int,
    longest: int,
    processes: int,
    flops: float | None,
    steps: int | None = None,
    tasks: list[str] | None = None,
    limit: int | None = None,
) -> Needs:
    """An estimate from the model's configuration alone.

    Args:
        source: folder or hub name.
        rows: that are to be run.
        protocol: how.
        examples: that a row is trained on.
        tokens: mean length of an example.
        longest: length of the longest one.
        processes: over which FSDP2 shards the weights.
        flops: of the device, per second; None if unknown.
        steps: most optimizer steps.
        tasks: of the evaluation, each as often as it is asked; None for the eleven.
        limit: most questions a task.
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
    batch_tokens = protocol.batch_size * min(longest, protocol.max_length)
    # With checkpointing every block keeps its input, and one block at a time the rest.
    kept = layers + _SAVED_PER_TOKEN if protocol.checkpointing != "off" else layers * _SAVED_PER_TOKEN
    activations = batch_tokens * hidden * kept * 2
    logits = batch_tokens * config.vocab_size * 4 * 3
    states = batch_tokens * hidden * (layers + 1) * 2
    memory = 2 * parameters // processes + adapter * 16 + activations + logits + states
    if flops is None:
        return Needs(parameters, 2 * parameters, memory, None, None)
    seen = examples * protocol.epochs
    if steps is not None:
        seen = min(seen, steps * protocol.batch_size * protocol.accumulate * processes)
    # Forward 2, backward to activations 2 FLOPs a parameter and token: frozen weights need no gradient. Checkpointing
    # has one more forward.
    training = (
        (6 if protocol.checkpointing != "off" else 4)
        * parameters
        * tokens
        * seen
        * sum(training_steps_of_sft(row, protocol) for row in rows)
    )
    asked = sum(min(SIZES[t][0], limit or SIZES[t][0]) * SIZES[t][1] for t in (ELEVEN if tasks is None else tasks))
    evaluation = 2 * parameters * asked * len(rows)
    return Needs(parameters, 2 * parameters, memory, training / flops, evaluation / flops)


def measured_flops(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float:
    """The share of a large matrix product's speed that training reaches on the device."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    a @ b
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(10):
        a @ b
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return _REACHED * 10 * 2 * size**3 / (time.perf_counter() - started)
