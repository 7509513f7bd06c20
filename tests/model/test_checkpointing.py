"""Activation checkpointing: non-reentrant gives the same gradients, reentrant is refused with the cure."""

from __future__ import annotations

import copy
import threading
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import set_checkpoint_early_stop

from lfu_reg import LfURegularizer
from tests.support.architectures import T5_CHECKPOINTS_FORWARD
from tests.support.cases import Case, seeded
from tests.support.checkpointed import (
    CheckpointedLM,
    GroupedLM,
    InnerLM,
    NestedLM,
    PlainLM,
    ReentrantLM,
    call_checkpointed,
)
from tests.support.compare import assert_same_gradients, gradients_of
from tests.support.harness import auxiliary
from tests.support.models import BERT, GPT2, LLAMA, PEFT, T5, TINY
from tests.support.snapshots import Snapshot

AUXILIARIES = ("lora", "steering", "weights", "random")


def gradients(model: nn.Module, case: Case, name: str, **options: Any) -> tuple[Tensor, dict[str, Tensor | None]]:
    aux = name if name == "random" else auxiliary(name)
    torch.manual_seed(7)
    with LfURegularizer(model, aux, alpha=0.05, lam=0.7, seed=3, **options) as reg:
        loss = reg(model, case.batch(), case.loss)
        loss.backward()
    return loss.detach(), gradients_of(model)


@pytest.mark.parametrize("case", [LLAMA, PEFT, GPT2, T5, BERT], ids=lambda c: c.name)
@pytest.mark.parametrize("name", AUXILIARIES)
def test_transformers_checkpointing(case: Case, name: str) -> None:
    if case is T5 and T5_CHECKPOINTS_FORWARD:
        pytest.skip("an older transformers checkpoints the forward of T5's layers, past all hooks: an error says so")
    model = case.make()
    plain = copy.deepcopy(model)
    if case is PEFT:
        model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss, got = gradients(model, case, name, strategy="released")
    expected_loss, want = gradients(plain, case, name, strategy="released")
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-12)
    assert_same_gradients(got, want)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("name", AUXILIARIES)
def test_checkpointing_by_hand(name: str, steps: int, dropout: float) -> None:
    got_loss, got = gradients(
        seeded(lambda: CheckpointedLM(dropout=dropout)), TINY, name, strategy="released", ascent_steps=steps
    )
    want_loss, want = gradients(
        seeded(lambda: PlainLM(dropout=dropout)), TINY, name, strategy="released", ascent_steps=steps
    )
    assert float(got_loss) == pytest.approx(float(want_loss), rel=1e-12)
    assert_same_gradients(got, want)


WAYS = (CheckpointedLM, GroupedLM, NestedLM, InnerLM)


@pytest.mark.parametrize("leave", ["auto", True])
@pytest.mark.parametrize("early_stop", [True, False], ids=["early-stop", "no-early-stop"])
@pytest.mark.parametrize("make", WAYS)
@pytest.mark.parametrize("name", AUXILIARIES)
def test_ways_to_checkpoint(name: str, make: type[nn.Module], early_stop: bool, leave: Any) -> None:
    """Hooks inside, outside and in the middle of regions; with `leave` the last of them leaves pass 2 inside of one."""
    with set_checkpoint_early_stop(early_stop):
        _, got = gradients(seeded(make), TINY, name, leave_early=leave)
    _, want = gradients(seeded(PlainLM), TINY, name)
    assert_same_gradients(got, want)


@pytest.mark.parametrize("name", AUXILIARIES)
def test_transformers_that_checkpoint_the_call(name: str) -> None:
    """Older versions checkpoint a layer's `__call__`, with its hooks in it, newer ones its `forward`."""
    _, got = gradients(call_checkpointed(LLAMA.make()), LLAMA, name)
    _, want = gradients(LLAMA.make(), LLAMA, name)
    assert_same_gradients(got, want)


@pytest.mark.parametrize("options", [{"strategy": "retained"}, {"stop_gradient": "none"}], ids=str)
@pytest.mark.parametrize("make", WAYS)
def test_retained_graphs_refuse_checkpoints(make: type[nn.Module], options: dict[str, Any]) -> None:
    """The caller's backward would repeat them without the perturbation. Nothing is left behind, and without it goes."""
    model = seeded(make)
    before = Snapshot.of(model)
    with LfURegularizer(model, "steering", **options) as reg:
        with pytest.raises(RuntimeError, match=r"Activation checkpointing does not go with .*strategy='retained'.*off"):
            reg(model, TINY.batch(), TINY.loss)
        before.check(model)


def test_a_graph_from_outside_refuses_checkpoints() -> None:
    """It has to be retained, whatever the strategy says."""
    model = seeded(CheckpointedLM)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    batch = {**TINY.batch(), "scale": scale * 2}
    with (
        LfURegularizer(model, "steering") as reg,
        pytest.raises(RuntimeError, match="compute it inside of sft_loss_fn"),
    ):
        reg(model, batch, lambda m, b: TINY.loss(m, b) * b["scale"])


@pytest.mark.parametrize("name", AUXILIARIES)
def test_bfloat16_autocast(name: str) -> None:
    """A repeat runs in the autocast of the pass: bit for bit the gradients without checkpoints."""

    class Autocast:
        def batch(self) -> Any:
            return TINY.batch()

        def loss(self, model: Any, batch: Any) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return TINY.loss(model, batch).float()

    found = []
    for make in (CheckpointedLM, PlainLM):
        model = seeded(make).float()
        # So that no block is reused: one backward for two sums in another order.
        model.blocks[0].norm.register_forward_hook(lambda *call: None)
        found.append(gradients(model, cast(Case, Autocast()), name)[1])
    for key, gradient in found[0].items():
        assert torch.equal(gradient, found[1][key]), key


@pytest.mark.parametrize("name", ["steering", "weights"])
def test_batch_norm_counts_one_step(name: str) -> None:
    """Blocks run up to four times; the statistics are those of one forward."""
    found = []
    for make in (GroupedLM, PlainLM):
        model = seeded(lambda make=make: make(batch_norm=True))
        _, got = gradients(model, TINY, name)
        found.append((got, dict(model.named_buffers())))
    assert_same_gradients(found[0][0], found[1][0])
    for key, buffer in found[0][1].items():
        assert torch.equal(buffer, found[1][1][key]), key


@pytest.mark.parametrize("name", AUXILIARIES)
def test_backward_in_another_thread(name: str) -> None:
    model = seeded(CheckpointedLM)
    aux = name if name == "random" else auxiliary(name)
    reg = LfURegularizer(model, aux, alpha=0.05, lam=0.7, seed=3)
    torch.manual_seed(7)
    loss = reg(model, TINY.batch(), TINY.loss)
    worker = threading.Thread(target=loss.backward)
    worker.start()
    worker.join()
    _, want = gradients(seeded(PlainLM), TINY, name)
    assert_same_gradients(gradients_of(model), want)


@pytest.mark.parametrize("strategy", ["auto", "released", "retained"])
@pytest.mark.parametrize("name", AUXILIARIES)
def test_reentrant_by_hand_is_refused(name: str, strategy: str) -> None:
    model = seeded(ReentrantLM)
    reg = LfURegularizer(model, name if name == "random" else auxiliary(name), strategy=strategy)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        reg(model, TINY.batch(), TINY.loss)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", AUXILIARIES)
def test_reentrant_in_transformers_is_refused(name: str) -> None:
    model = LLAMA.make()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    reg = LfURegularizer(model, name if name == "random" else auxiliary(name))
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        reg(model, LLAMA.batch(), LLAMA.loss)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("head", [True, False], ids=["head-trained", "head-frozen"])
@pytest.mark.parametrize("name", AUXILIARIES)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_without_an_input_that_requires_gradients(name: str, head: bool) -> None:
    """The checkpoint is not even in the graph."""
    model = seeded(ReentrantLM)
    for part in (model.embed, *(() if head else (model.norm, model.head))):
        part.requires_grad_(False)
    reg = LfURegularizer(model, name if name == "random" else auxiliary(name))
    with pytest.raises((RuntimeError, ValueError), match="use_reentrant=False"):
        reg(model, TINY.batch(), TINY.loss)


def test_micro_batches_in_one_autocast_context() -> None:
    """Autocast keeps the casts of the weights from the first to the second, which are older than that one's graph."""
    model = CheckpointedLM().float()
    plain = copy.deepcopy(model)
    batches = [TINY.batch(seed) for seed in (0, 1)]
    with LfURegularizer(model, "steering", alpha=1e-4, lam=1e-9) as reg, torch.autocast("cpu", torch.bfloat16):
        sum(reg(model, batch, TINY.loss) for batch in batches).backward()
    with torch.autocast("cpu", torch.bfloat16):
        sum(TINY.loss(plain, batch) for batch in batches).backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=2e-2, atol=2e-2 * float(other.grad.abs().max()))
