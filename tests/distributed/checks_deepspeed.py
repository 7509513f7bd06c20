"""DeepSpeed on two processes: ZeRO-0, 1 and 2 with gradient accumulation."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.distributed.reference import parameters_of, regularizer, train
from tests.support.compare import assert_same_gradients
from tests.support.models import TINY
from tests.support.refusals import says

SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
MICRO = 2

# Compiled on first use, under a lock that a killed process never gives back; only a faster all-reduce on one host.
importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None


def float32() -> nn.Module:
    return TINY.make().float()


def engine_of(model: nn.Module, stage: int) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": MICRO,
        "zero_optimization": {"stage": stage, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    return deepspeed.initialize(
        model=model, optimizer=SGD(model.parameters()), config=config, dist_init_required=False
    )[0]


def check_zero_0_to_2() -> None:
    for name in ("lora", "steering", "weights"):
        want = train(TINY, name, steps=2, micro=MICRO, make=float32, optimizer=SGD)[1]
        for stage in (0, 1, 2):
            model = float32()
            engine = engine_of(model, stage)
            with regularizer(model, name) as reg:
                for number in range(2 * MICRO):
                    batch = TINY.batch(10 * number + dist.get_rank())
                    engine.backward(reg(engine.module, batch, TINY.loss))
                    engine.step()
            assert_same_gradients(parameters_of(model), want, 1e-5)


def check_the_engine_is_refused() -> None:
    model = float32()
    engine = engine_of(model, 1)
    with regularizer(model, "steering") as reg, pytest.raises(ValueError, match=says("engine.module")):
        reg(engine, TINY.batch(), TINY.loss)
