"""Tensor parallelism (`parallelize_module`) on two processes: gradients are those of the whole model."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.utils._python_dispatch import TorchDispatchMode

from lfu_reg.step.strength import FIRST_STEPS
from tests.distributed.reference import parameters_of, regularizer, whole
from tests.distributed.sharding import blocks_of, gradients_of, same_on_all_ranks
from tests.support.architectures import llama
from tests.support.cases import Case, seeded, token_batch
from tests.support.compare import assert_same_gradients, close
from tests.support.models import LLAMA, TINY
from tests.support.plain_models import TinyLM
from tests.support.refusals import says

Plan = Mapping[str, Any]
Plans = Callable[[], Sequence[Plan]]
AUXILIARIES = ("lora", "steering", "weights")


@functools.cache
def mesh() -> Any:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def columns_and_rows() -> Sequence[Plan]:
    return [{"up": ColwiseParallel(), "down": RowwiseParallel()}]


def parallel(model: nn.Module, plans: Plans = columns_and_rows, top: Plan | None = None) -> nn.Module:
    """`plans` on every block, one after the other, and `top` on the model."""
    for block in blocks_of(model):
        for plan in plans():
            parallelize_module(block, mesh(), dict(plan))
    return parallelize_module(model, mesh(), dict(top)) if top else model


def train(model: nn.Module, case: Case, name: str, extra: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """Three steps of SGD; returns the last loss and gradients, and the parameters."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)
    with regularizer(model, name, **options) as reg:
        for step in range(3):
            optimizer.zero_grad()
            loss = reg(model, case.batch(step), case.loss, **extra)
            loss.backward()
            gradients = gradients_of(model)
            optimizer.step()
    return float(loss.detach()), gradients, parameters_of(model)


def compare(
    case: Case,
    name: str,
    plans: Plans = columns_and_rows,
    *,
    top: Plan | None = None,
    extra: Mapping[str, Any] | None = None,
    around: Any = nullcontext,
    **options: Any,
) -> None:
    with around():
        loss, gradients, parameters = train(parallel(case.make(), plans, top), case, name, extra or {}, options)
    want_loss, want_gradients, want_parameters = train(case.make(), case, name, extra or {}, options)
    close(loss, want_loss, 1e-10)
    assert_same_gradients(gradients, want_gradients)
    assert_same_gradients(parameters, want_parameters)


def check_columns_and_rows() -> None:
    for name in AUXILIARIES:
        compare(TINY, name)


def check_options() -> None:
    for name, options in [
        ("lora", {"ascent_steps": 2}),
        ("weights", {"ascent_steps": 2}),
        ("lora", {"batch_fraction": 0.5}),
        ("weights", {"batch_fraction": 0.5}),
        ("lora", {"stop_gradient": "none"}),
        ("weights", {"stop_gradient": "none"}),
        ("steering", {"sync_perturbation": True}),
    ]:
        compare(TINY, name, **options)
    for name in AUXILIARIES:
        compare(TINY, name, extra={"undesirable": TINY.batch(77)})


def check_whole_transformer() -> None:
    """Attention by heads, a gated MLP, the embedding and the head: all linear maps are sharded."""

    def plans() -> Sequence[Plan]:
        columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
        rows = ("self_attn.o_proj", "mlp.down_proj")
        return [{n: ColwiseParallel() for n in columns}, {n: RowwiseParallel() for n in rows}]

    for name in AUXILIARIES:
        top = {
            "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
            "lm_head": ColwiseParallel(output_layouts=Replicate()),
        }
        compare(replace(LLAMA, make=lambda: seeded(lambda: llama(num_key_value_heads=2))), name, plans, top=top)


def check_loss_parallel() -> None:
    for name in AUXILIARIES:
        top = {"head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)}
        compare(TINY, name, top=top, around=loss_parallel)


def check_sequence_parallel_inside_of_a_block() -> None:
    """The norm runs on slices of the sequence; what blocks return is whole."""
    split = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1), use_local_output=False)

    def plans() -> Sequence[Plan]:
        return {"norm": split}, {"norm": SequenceParallel(), **columns_and_rows()[0]}

    try:
        TINY.loss(parallel(TINY.make(), plans), TINY.batch())
    except RuntimeError as error:
        pytest.skip(f"torch 2.6 runs no linear map on such slices, with or without a regularizer: {error}")
    for name in AUXILIARIES:
        compare(TINY, name, plans)


def check_ranks_with_seeds_of_their_own() -> None:
    """All ranks have the A of the first one."""
    model = parallel(TINY.make())
    reg = regularizer(model, "lora", seed=3 + dist.get_rank())
    reg(model, TINY.batch(), TINY.loss).backward()
    want = TINY.make()
    regularizer(want, "lora", seed=3)(want, TINY.batch(), TINY.loss).backward()
    assert_same_gradients(gradients_of(model), gradients_of(want))


class Collectives(TorchDispatchMode):
    """Counts them. (`CommDebugMode` has module hooks of its own, which early exits and patches confuse.)"""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented
        name = function.overloadpacket.__name__
        if function.namespace in ("_c10d_functional", "c10d") and not name.startswith("_wrap") and "wait" not in name:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


def check_collectives() -> None:
    """As many on every rank: those of two SFT steps, and of g and its norm."""
    model = parallel(TINY.make())
    with Collectives() as plain:
        TINY.loss(model, TINY.batch()).backward()
    assert plain.counts == {"all_reduce": 6}
    # A backward for g needs none through the first block. LoRA: one A for each linear map.
    expected = {"steering": ("all_reduce", 14), "weights": ("all_reduce", 16), "lora": ("broadcast_", 6)}
    for name, (kind, number) in expected.items():
        with regularizer(model, name) as reg, Collectives() as counted:
            reg._progress.step, reg._progress.strength.seen = 11, FIRST_STEPS  # nothing is measured
            reg(model, TINY.batch(), TINY.loss).backward()
        assert counted.counts[kind] == number, counted.counts
        assert same_on_all_ranks(counted.counts.total())


class LinearBlocks(nn.Module):
    """Its blocks are linear maps, so they return what the parallel style returns."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 13)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(whole(hidden))


def check_refusals() -> None:
    model = parallel(TINY.make())
    for name, options, parts in [
        ("weights", {"sync_perturbation": True}, ("sync_perturbation=True", "parts", "sync_perturbation=False")),
        ("lora", {"sync_perturbation": True}, ("sync_perturbation=True", "parts", "sync_perturbation=False")),
        ("steering", {"strategy": "released"}, ("strategy='released'", "tensor parallelism", "strategy='auto'")),
    ]:
        with pytest.raises(ValueError, match=says(*parts)), regularizer(model, name, **options) as reg:
            reg(model, TINY.batch(), TINY.loss)
    for name in AUXILIARIES:
        style = RowwiseParallel(input_layouts=Replicate(), use_local_output=False)
        other = seeded(LinearBlocks)
        parallelize_module(other.blocks, mesh(), {"*": style})
        with pytest.raises(ValueError, match=says("DTensor", "output_layouts")), regularizer(other, name) as reg:
            reg(other, TINY.batch(), TINY.loss)
    assert all(p.grad is None for p in model.parameters())


class Sliced(TinyLM):
    """Blocks hand slices of the sequence to each other."""

    def body(self, hidden: Tensor) -> Tensor:
        hidden = DTensor.from_local(hidden, mesh(), [Replicate()]).redistribute(placements=[Shard(1)]).to_local()
        for block in self.blocks:
            hidden = block(hidden)
        return DTensor.from_local(hidden, mesh(), [Shard(1)]).full_tensor()


def check_slices_between_blocks_are_refused() -> None:
    columns = ColwiseParallel(input_layouts=Shard(1))
    rows = RowwiseParallel(output_layouts=Shard(1))
    for name in AUXILIARIES:
        model = parallel(seeded(Sliced), lambda: [{"norm": SequenceParallel(), "up": columns, "down": rows}])
        with pytest.raises(ValueError, match=says("slices", "output_layouts")), regularizer(model, name) as reg:
            reg(model, token_batch(shape=(3, 8), labels=False), lambda m, b: m(b["input_ids"]).square().mean())
