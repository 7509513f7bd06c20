"""DDP and FSDP2 over a process group of one process: the collectives run, and give what there is without them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gpu.place import Place
from gpu.smoke import AUXILIARIES, SAME, STRONG, distance, gradients, taken, within, workload
from lfu_reg import LfURegularizer
from lfu_reg.model.layers import choose_layers


def ddp(place: Place) -> dict[str, Any]:
    """One step of each auxiliary in DDP against the plain one."""
    found = {}
    with process_group(place):
        for name in AUXILIARIES:
            made = workload(place)
            wrapped = DistributedDataParallel(made.model)
            with LfURegularizer(made.model, name, seed=0, **STRONG) as reg:
                reg(wrapped, made.batch, made.sft_loss).backward()
            found[name] = distance(taken(made.model), gradients(workload(place), name))
    return within(found, SAME)


def fsdp2(place: Place) -> dict[str, Any]:
    """The same, sharded block by block."""
    found = {}
    with process_group(place):
        for name in AUXILIARIES:
            made = workload(place)
            for block in choose_layers(made.model, "all").values():
                fully_shard(block)
            fully_shard(made.model)
            with LfURegularizer(made.model, name, seed=0, **STRONG) as reg:
                reg(made.model, made.batch, made.sft_loss).backward()
            for parameter in made.model.parameters():
                if parameter.grad is not None:
                    parameter.grad = parameter.grad.full_tensor()
            found[name] = distance(taken(made.model), gradients(workload(place), name))
    return within(found, SAME)


@contextmanager
def process_group(place: Place) -> Iterator[None]:
    """Of this process alone."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            place.device.backend, init_method=f"file://{Path(folder) / 'store'}", rank=0, world_size=1
        )
        try:
            yield
        finally:
            dist.destroy_process_group()
