"""Hooks are where the blocks are, also when there are more or fewer of them than before."""

from __future__ import annotations

import pytest
import torch

from lfu_reg import LfURegularizer
from tests.support.cases import plain_loss, seeded, token_batch
from tests.support.compare import assert_same_gradients, gradients_of
from tests.support.harness import auxiliary
from tests.support.plain_models import ResidualBlock, TinyLM


@pytest.mark.parametrize("name", ["steering", "lora", "weights"])
@pytest.mark.parametrize("change", [1, -1], ids=["longer", "shorter"])
def test_a_list_of_blocks_that_becomes(change: int, name: str) -> None:
    models = [seeded(TinyLM), seeded(TinyLM)]

    def changed(model: TinyLM) -> TinyLM:
        if change > 0:
            torch.manual_seed(3)
            model.blocks.append(ResidualBlock(8).double())
        else:
            del model.blocks[-1]
        return model

    options = {"alpha": 0.05, "lam": 0.7, "seed": 1}
    early = LfURegularizer(models[0], auxiliary(name), **options)
    late = LfURegularizer(changed(models[1]), auxiliary(name), **options)
    changed(models[0])
    for reg, model in ((early, models[0]), (late, models[1])):
        reg(model, token_batch(2), plain_loss).backward()
    assert early.layers == late.layers == tuple(f"blocks.{i}" for i in range(3 + change))
    assert_same_gradients(gradients_of(models[0]), gradients_of(models[1]))
    early.remove()
    assert not any(module._forward_hooks for module in models[0].modules())
