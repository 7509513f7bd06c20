"""The library works unchanged on every model: exact gradients, nothing left behind, buffers as after plain SFT."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lfu_reg import LfURegularizer
from tests.support.architectures import MAMBA_CALLS_DT_PROJ
from tests.support.cases import Case, seeded
from tests.support.compare import gradients_of
from tests.support.harness import auxiliary, run_pair
from tests.support.models import ALBERT, CNN, LENT_WEIGHTS, MIXTRAL, SWIN, TINY, ZOO, images
from tests.support.oracle_parts import linear_maps
from tests.support.plain_models import TinyLM
from tests.support.snapshots import Snapshot, buffers_of, differing

pytestmark = pytest.mark.filterwarnings(LENT_WEIGHTS)

PAIRS = [(case, name) for case in ZOO for name in case.auxiliaries]


def pair_id(value: Any) -> str:
    return value.name if isinstance(value, Case) else str(value)


@pytest.mark.parametrize("strategy", ["released", "retained"])
@pytest.mark.parametrize(("case", "name"), PAIRS, ids=pair_id)
def test_gradients_equal_the_oracles(case: Case, name: str, strategy: str) -> None:
    torch.manual_seed(4)
    pair = run_pair(case, name, reg_options={"strategy": strategy})
    assert pair.reg.layers == case.layers
    pair.check()
    assert float(pair.want.consistency) > 0, "a comparison of nothing"


@pytest.mark.parametrize(("case", "name"), PAIRS, ids=pair_id)
def test_nothing_stays_behind(case: Case, name: str) -> None:
    model, batch = case.make(), case.batch()
    before = Snapshot.of(model)
    reg = LfURegularizer(model, auxiliary(name))
    attached = Snapshot.of(model)
    reg(model, batch, case.loss).backward()
    attached.check(model, gradients=False)
    reg.remove()
    before.check(model, gradients=False)


@pytest.mark.parametrize(("case", "name"), PAIRS, ids=pair_id)
def test_buffers_and_random_state_are_those_of_plain_sft(case: Case, name: str) -> None:
    model = case.make()
    plain = copy.deepcopy(model)
    torch.manual_seed(4)
    sft = case.loss(plain, case.batch())
    state = torch.get_rng_state()
    torch.manual_seed(4)
    reg = LfURegularizer(model, auxiliary(name))
    loss = reg(model, case.batch(), case.loss)
    assert torch.equal(torch.get_rng_state(), state)
    # Products of a wider adapter, into which LoRA deltas are folded, may be rounded in another order.
    folded = name == "lora" and "peft" in case.name
    torch.testing.assert_close(reg.metrics["sft_loss"], sft.detach(), rtol=1e-13 if folded else 0, atol=0)
    assert not differing(buffers_of(model), buffers_of(plain))
    loss.backward()
    assert not differing(buffers_of(model), buffers_of(plain))


@pytest.mark.parametrize("strategy", ["released", "retained"])
@pytest.mark.parametrize("name", ["lora", "steering", "weights"])
def test_batch_norm_counts_one_step(name: str, strategy: str) -> None:
    make = lambda: seeded(lambda: TinyLM(batch_norm=True, dropout=0.2))  # noqa: E731
    model, plain = make(), make()
    torch.manual_seed(4)
    TINY.loss(plain, TINY.batch())
    torch.manual_seed(4)
    reg = LfURegularizer(model, auxiliary(name), strategy=strategy)
    reg(model, TINY.batch(), TINY.loss).backward()
    assert int(model.batch_norms[0].num_batches_tracked) == len(model.blocks)
    assert not differing(buffers_of(model), buffers_of(plain))


@pytest.mark.parametrize("name", ["steering", "weights"])
def test_batch_norm_over_several_steps_of_a_cnn(name: str) -> None:
    model, plain = CNN.make(), CNN.make()
    reg = LfURegularizer(model, auxiliary(name))
    for seed in range(4):
        reg(model, images(seed), CNN.loss).backward()
        CNN.loss(plain, images(seed))
    assert not differing(buffers_of(model), buffers_of(plain))
    assert int(model.stages[0].norm.num_batches_tracked) == 4


@pytest.mark.parametrize("case", [case for case in ZOO if case.linears], ids=lambda c: c.name)
def test_every_linear_map_that_runs_gets_a_delta(case: Case) -> None:
    model = case.make()
    reg = LfURegularizer(model, auxiliary("lora"))
    reg(model, case.batch(), case.loss).backward()
    moved = {name for name, (_, b) in reg.perturbation.items() if bool(b.any())}
    everything = linear_maps(model, case.layers)
    # Two kinds of linear map lend their weight to a function and are never called.
    lent = ("self_attn.out_proj",) if MAMBA_CALLS_DT_PROJ else ("self_attn.out_proj", "dt_proj")
    runs = {name for name in everything if not name.endswith(lent)}
    assert moved == runs
    assert len(runs) == case.linears
    for name, (a, b) in reg.perturbation.items():
        if name in runs:
            assert a.shape == (2, everything[name][0])
            assert b.shape == (everything[name][1], 2)


def test_steering_follows_the_width() -> None:
    model = SWIN.make()
    reg = LfURegularizer(model, "steering")
    reg(model, SWIN.batch(), SWIN.loss)
    widths = [len(d) for d in reg.perturbation.values()]
    assert len(set(widths)) == 2
    model = CNN.make()
    reg = LfURegularizer(model, "steering")
    reg(model, CNN.batch(), CNN.loss)
    assert [len(d) for d in reg.perturbation.values()] == [4, 6, 6]  # channels, not pixels


def test_a_shared_layer_has_one_component() -> None:
    model = ALBERT.make()
    reg = LfURegularizer(model, "steering")
    reg(model, ALBERT.batch(), ALBERT.loss)
    assert len(reg.perturbation) == len(reg.layers) == 1


def test_the_routers_loss_is_counted_once() -> None:
    """Mixtral's auxiliary loss comes from pass 1 alone."""

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        out = model(**batch, output_router_logits=True, use_cache=False)
        return out.loss

    model, plain = MIXTRAL.make(), MIXTRAL.make()
    loss(plain, MIXTRAL.batch()).backward()
    reg = LfURegularizer(model, auxiliary("steering"), lam=0.0)
    reg(model, MIXTRAL.batch(), loss).backward()
    for (key, got), want in zip(gradients_of(model).items(), gradients_of(plain).values(), strict=True):
        assert torch.equal(got, want), key
