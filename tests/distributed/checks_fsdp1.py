"""FSDP1 (`FullyShardedDataParallel`) on two processes."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.utils.checkpoint import checkpoint

from tests.distributed.reference import expected, parameters_of, regularizer, train
from tests.support.compare import assert_same_gradients
from tests.support.harness import a_matrices_of
from tests.support.models import TINY
from tests.support.plain_models import ResidualBlock
from tests.support.refusals import says

SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def shard(model: nn.Module, *, use_orig_params: bool) -> Any:
    return FSDP(
        model,
        auto_wrap_policy=ModuleWrapPolicy({ResidualBlock}),
        use_orig_params=use_orig_params,
        device_id=torch.device("cpu"),
    )


def whole_gradients(model: Any) -> dict[str, Tensor | None]:
    with FSDP.summon_full_params(model, with_grads=True):
        return {
            name.replace("_fsdp_wrapped_module.", ""): None if p.grad is None else p.grad.clone()
            for name, p in model.named_parameters()
        }


def whole_parameters(model: Any) -> dict[str, Tensor]:
    with FSDP.summon_full_params(model):
        return {n.replace("_fsdp_wrapped_module.", ""): p for n, p in parameters_of(model).items()}


def renamed(a_matrices: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("_fsdp_wrapped_module.", ""): a for name, a in a_matrices.items()}


def check_gradients() -> None:
    """With the regularizer on the model inside of the wrapper, and on the wrapper."""
    for on_wrapper in (False, True):
        for name in ("steering", "lora"):
            model = TINY.make()
            reg = None if on_wrapper else regularizer(model, name)
            fsdp = shard(model, use_orig_params=True)
            reg = reg or regularizer(fsdp, name)
            reg(fsdp, TINY.batch(dist.get_rank()), TINY.loss).backward()
            want = expected(TINY, name, [renamed(a_matrices_of(reg))] * 2)
            assert_same_gradients(whole_gradients(fsdp), want)


def check_training() -> None:
    want = train(TINY, "steering", steps=2, optimizer=SGD)[1]
    for use_orig_params in (True, False):
        fsdp = shard(TINY.make(), use_orig_params=use_orig_params)
        optimizer = SGD(fsdp.parameters())
        with regularizer(fsdp, "steering") as reg:
            for number in range(2):
                optimizer.zero_grad()
                reg(fsdp, TINY.batch(10 * number + dist.get_rank()), TINY.loss).backward()
                optimizer.step()
        assert_same_gradients(whole_parameters(fsdp), want)


def check_what_needs_gradients_of_parameters_is_refused() -> None:
    fsdp = shard(TINY.make(), use_orig_params=True)
    for name, options, parts in [
        ("steering", {"strategy": "released"}, ("FSDP1", "strategy='auto'", "fully_shard")),
        ("weights", {}, ("FSDP1", "fully_shard", "auxiliary='lora'")),
    ]:
        with regularizer(fsdp, name, **options) as reg, pytest.raises(ValueError, match=says(*parts)):
            reg(fsdp, TINY.batch(), TINY.loss)


def check_strength_is_refused_with_the_cure() -> None:
    """There is no gradient that it could follow from."""
    for strategy in ("auto", "one-backward"):
        fsdp = shard(TINY.make(), use_orig_params=True)
        with regularizer(fsdp, "steering", lam=None, strength=1.0, strategy=strategy) as reg:
            if strategy == "one-backward":
                reg(fsdp, TINY.batch(), TINY.loss).backward()
            with pytest.raises(ValueError, match=says("strength=1.0", "FSDP1", "Give lam", "fully_shard")):
                reg(fsdp, TINY.batch(dist.get_rank()), TINY.loss)


def check_one_backward() -> None:
    """With a fixed lam, also through checkpoints: it is the backward of plain SFT."""
    for name in ("steering", "lora"):
        want = train(TINY, name, steps=3, optimizer=SGD, strategy="one-backward")[1]
        for checkpointed in (False, True):
            model: Any = TINY.make()
            for block in model.blocks if checkpointed else ():
                block.__class__ = CheckpointedBlock
            fsdp = FSDP(
                model,
                auto_wrap_policy=ModuleWrapPolicy({ResidualBlock, CheckpointedBlock}),
                use_orig_params=True,
                device_id=torch.device("cpu"),
            )
            optimizer = SGD(fsdp.parameters())
            with regularizer(fsdp, name, strategy="one-backward") as reg:
                for number in range(3):
                    optimizer.zero_grad()
                    reg(fsdp, TINY.batch(10 * number + dist.get_rank()), TINY.loss).backward()
                    optimizer.step()
                assert "consistency_loss" in reg.metrics
            assert_same_gradients(whole_parameters(fsdp), want)


class CheckpointedBlock(ResidualBlock):
    def forward(self, hidden: Tensor) -> Tensor:
        return checkpoint(super().forward, hidden, use_reentrant=False)


def check_checkpointing() -> None:
    """A retained graph would repeat blocks without the perturbation, so it is refused."""
    for name in ("steering", "lora"):
        model: Any = TINY.make()
        for block in model.blocks:
            block.__class__ = CheckpointedBlock
        fsdp = shard(model, use_orig_params=True)
        with pytest.raises(RuntimeError, match="Activation checkpointing does not go with a graph that is retained"):
            regularizer(fsdp, name)(fsdp, TINY.batch(dist.get_rank()), TINY.loss)
