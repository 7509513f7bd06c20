"""Checkpoints in a graph that the caller backpropagates when the step is over: repeated as they ran, or refused."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from lfu_reg import LfURegularizer, SteeringVectors
from lfu_reg.auxiliaries import Auxiliary
from lfu_reg.model import checkpointing
from tests.support.architectures import T5_CHECKPOINTS_FORWARD
from tests.support.cases import Case, seeded
from tests.support.checkpointed import CheckpointedLM, NestedLM, PlainLM
from tests.support.compare import assert_same_gradients, gradients_of
from tests.support.harness import auxiliary
from tests.support.models import GPT2, LLAMA, PEFT, T5, TINY

AUXILIARIES = ("lora", "steering", "weights", "random")
ENTRANCE = "_checkpoint_without_reentrant_generator"


@pytest.fixture(autouse=True)
def torch_is_left_alone() -> Iterator[None]:
    before = getattr(torch.utils.checkpoint, ENTRANCE), torch.autograd.graph.saved_tensors_hooks.__enter__
    yield
    after = getattr(torch.utils.checkpoint, ENTRANCE), torch.autograd.graph.saved_tensors_hooks.__enter__
    assert before == after
    assert not checkpointing._surroundings


def attach(model: nn.Module, name: str, **options: Any) -> LfURegularizer:
    aux = name if name == "random" else auxiliary(name)
    settings = {"alpha": 0.05, "lam": 0.7, "seed": 3, "strategy": "retained", **options}
    return LfURegularizer(model, aux, **settings)


def one_step(model: nn.Module, case: Case, name: str, batch: Any = None, **options: Any) -> dict[str, Tensor | None]:
    torch.manual_seed(7)
    with attach(model, name, **options) as reg:
        reg(model, case.batch() if batch is None else batch, case.loss).backward()
    return gradients_of(model)


def in_a_thread(run: Callable[[], Any]) -> None:
    failed: list[BaseException] = []

    def watched() -> None:
        try:
            run()
        except BaseException as error:
            failed.append(error)

    worker = threading.Thread(target=watched)
    worker.start()
    worker.join()
    if failed:
        raise failed[0]


def enable_checkpointing(model: nn.Module) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


@pytest.mark.parametrize("case", [LLAMA, PEFT, GPT2, T5], ids=lambda c: c.name)
@pytest.mark.parametrize("name", AUXILIARIES)
def test_transformers(case: Case, name: str) -> None:
    if case is T5 and T5_CHECKPOINTS_FORWARD:
        pytest.skip("an older transformers checkpoints the forward of T5's layers, past all hooks: an error says so")
    model = case.make()
    plain = copy.deepcopy(model)
    enable_checkpointing(model)
    assert_same_gradients(one_step(model, case, name), one_step(plain, case, name))


@pytest.mark.parametrize("stop", ["perturbed", "none"])
@pytest.mark.parametrize("name", AUXILIARIES)
def test_gradients_through_the_clean_states(name: str, stop: str) -> None:
    options = {"strategy": "auto", "stop_gradient": stop}
    got = one_step(seeded(CheckpointedLM), TINY, name, **options)
    assert_same_gradients(got, one_step(seeded(PlainLM), TINY, name, **options))


@pytest.mark.parametrize(
    "options", [{"ascent_steps": 2}, {"batch_fraction": 0.5}, {"layers": [0, 1]}], ids=["ascent", "fraction", "layers"]
)
@pytest.mark.parametrize("name", AUXILIARIES)
def test_other_settings(name: str, options: dict[str, Any]) -> None:
    got = one_step(seeded(CheckpointedLM), TINY, name, **options)
    assert_same_gradients(got, one_step(seeded(PlainLM), TINY, name, **options))


@pytest.mark.parametrize("name", AUXILIARIES)
def test_dropout(name: str) -> None:
    got = one_step(seeded(lambda: CheckpointedLM(dropout=0.3)), TINY, name)
    assert_same_gradients(got, one_step(seeded(lambda: PlainLM(dropout=0.3)), TINY, name))


@pytest.mark.parametrize("make", [CheckpointedLM, NestedLM])
@pytest.mark.parametrize("thread", [False, True], ids=["same-thread", "other-thread"])
@pytest.mark.parametrize("name", AUXILIARIES)
def test_several_live_graphs(name: str, thread: bool, make: type[nn.Module]) -> None:
    """Each repeats with its own tokens and its own components: LoRA's A is another one at every step."""

    def summed(model: nn.Module) -> Tensor:
        reg = attach(model, name)
        losses = [reg(model, TINY.batch(seed), TINY.loss) for seed in range(3)]
        with reg.disabled():  # one without a perturbation among them
            losses.append(reg(model, TINY.batch(9), TINY.loss))
        return torch.stack(losses).sum()

    model, plain = seeded(make), seeded(PlainLM)
    loss = summed(model)
    if thread:
        in_a_thread(loss.backward)
    else:
        loss.backward()
    summed(plain).backward()
    assert_same_gradients(gradients_of(model), gradients_of(plain))


@pytest.mark.parametrize("name", AUXILIARIES)
def test_backwards_in_threads_at_the_same_time(name: str) -> None:
    def losses(model: nn.Module) -> list[Tensor]:
        reg = attach(model, name)
        return [reg(model, TINY.batch(seed), TINY.loss) for seed in range(4)]

    model, plain = seeded(CheckpointedLM), seeded(PlainLM)
    workers = [threading.Thread(target=loss.backward) for loss in losses(model)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    torch.stack(losses(plain)).sum().backward()
    assert_same_gradients(gradients_of(model), gradients_of(plain))


@pytest.mark.parametrize("name", AUXILIARIES)
def test_a_backward_while_another_pass_runs(name: str) -> None:
    """A loss function that backpropagates an earlier loss: the repeat belongs to the earlier pass, not to this one."""

    def run(model: nn.Module) -> dict[str, Tensor | None]:
        reg = attach(model, name)
        earlier = reg(model, TINY.batch(1), TINY.loss)

        def loss(m: Any, batch: Any) -> Tensor:
            nonlocal earlier
            value = TINY.loss(m, batch)
            if earlier is not None:
                earlier, now = None, earlier
                now.backward()
            return value

        reg(model, TINY.batch(2), loss).backward()
        return gradients_of(model)

    assert_same_gradients(run(seeded(CheckpointedLM)), run(seeded(PlainLM)))


def test_a_forward_while_another_thread_repeats() -> None:
    """The thread that repeats a block sees the pass of the block, every other thread its own: here none."""
    model = seeded(CheckpointedLM)
    reg = attach(model, "steering", alpha=1.0)
    loss = reg(model, TINY.batch(1), TINY.loss)
    want = TINY.loss(model, TINY.batch(2))
    inside, go_on = threading.Event(), threading.Event()
    main = threading.get_ident()

    def wait(module: nn.Module, args: Any) -> None:
        if threading.get_ident() != main:
            inside.set()
            go_on.wait(10)

    model.blocks[1].register_forward_pre_hook(wait)
    worker = threading.Thread(target=loss.backward)
    worker.start()
    try:
        assert inside.wait(10)
        got = TINY.loss(model, TINY.batch(2))
    finally:
        go_on.set()
        worker.join()
    assert torch.equal(got, want)
    one_step_model = seeded(PlainLM)
    with attach(one_step_model, "steering", alpha=1.0) as reg:
        reg(one_step_model, TINY.batch(1), TINY.loss).backward()
    assert_same_gradients(gradients_of(model), gradients_of(one_step_model))


@pytest.mark.filterwarnings("ignore:module forward hook")
def test_composable_checkpointing() -> None:
    """The hook-based variant repeats a block only once: refused here, right with the default."""
    composable = pytest.importorskip("torch.distributed._composable.checkpoint_activation")
    model, plain = seeded(PlainLM), seeded(PlainLM)
    reg = attach(model, "lora")
    for block in model.blocks:
        composable.checkpoint(block)
    with pytest.raises(RuntimeError, match=r"only once.*strategy='released'"):
        reg(model, TINY.batch(), TINY.loss)
    reg.remove()
    with attach(model, "lora", strategy="released") as reg:
        reg(model, TINY.batch(), TINY.loss).backward()
    assert_same_gradients(gradients_of(model), one_step(plain, TINY, "lora"))


@pytest.mark.parametrize("name", AUXILIARIES)
def test_an_abandoned_loss_is_freed(name: str) -> None:
    """No cycle through the graph: without a backward, and without the garbage collector."""
    model = seeded(CheckpointedLM)
    reg = attach(model, name)
    reg(model, TINY.batch(), TINY.loss).backward()
    kept: list[weakref.ref[Any]] = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.alive = Alive()
            kept.append(weakref.ref(ctx.alive))
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            return grad

    class Alive:
        pass

    handle = model.blocks[0].register_forward_pre_hook(lambda m, args: (Probe.apply(args[0]),))
    gc.collect()
    gc.disable()
    try:
        loss = reg(model, TINY.batch(), TINY.loss)
        assert sum(ref() is not None for ref in kept) == 2
        del loss
        assert sum(ref() is not None for ref in kept) == 0
    finally:
        gc.enable()
    handle.remove()


def test_removed_before_the_backward() -> None:
    model = seeded(CheckpointedLM)
    reg = attach(model, "steering")
    loss = reg(model, TINY.batch(), TINY.loss)
    reg.remove()
    with pytest.raises(RuntimeError, match=r"after remove\(\).*Call remove\(\) after backward\(\)"):
        loss.backward()


class OwnAuxiliary(SteeringVectors):
    """One that does not say how to keep its components."""

    def frozen(self) -> None:  # type: ignore[override]
        return Auxiliary.frozen(self)  # type: ignore[return-value]


@pytest.mark.parametrize("reason", ["auxiliary", "torch"])
def test_what_cannot_be_repeated_is_refused(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason == "torch":
        monkeypatch.setattr(checkpointing, "_ENTRANCE", "no_such_name")
    aux = OwnAuxiliary() if reason == "auxiliary" else SteeringVectors()
    model = seeded(CheckpointedLM)
    reg = LfURegularizer(model, aux, strategy="retained")
    with pytest.raises(RuntimeError, match=r"checkpointing does not go.*strategy='released'"):
        reg(model, TINY.batch(), TINY.loss)
    assert all(p.grad is None for p in model.parameters())
    # Without a checkpoint nothing is in the way, other hooks on saved tensors least of all.
    reg.remove()
    plain = seeded(PlainLM)
    with LfURegularizer(plain, aux, strategy="retained") as reg, torch.autograd.graph.save_on_cpu():
        reg(plain, TINY.batch(), TINY.loss).backward()


@pytest.mark.parametrize("name", AUXILIARIES)
def test_an_exception_leaves_torch_alone(name: str) -> None:
    model = seeded(CheckpointedLM)
    reg = attach(model, name)

    def fails(m: Any, batch: Any) -> Tensor:
        TINY.loss(m, batch)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        reg(model, TINY.batch(), fails)
    assert_same_gradients(one_step_with(reg, model), one_step(seeded(PlainLM), TINY, name))


def one_step_with(reg: LfURegularizer, model: nn.Module) -> dict[str, Tensor | None]:
    torch.manual_seed(7)
    reg(model, TINY.batch(), TINY.loss).backward()
    return gradients_of(model)


def test_refusing_in_two_threads_at_the_same_time() -> None:
    """The first to leave must not take the other's watch away, nor the last one leave it behind."""
    enter = torch.autograd.graph.saved_tensors_hooks.__enter__
    inside, left = threading.Event(), threading.Event()
    found: list[str] = []

    def other() -> None:
        with checkpointing.refused("of the other"):
            inside.set()
            left.wait(30)
            try:
                torch.utils.checkpoint.checkpoint(nn.Linear(2, 2), torch.ones(1, 2), use_reentrant=False)
            except RuntimeError as error:
                found.append(str(error))

    thread = threading.Thread(target=other)
    with checkpointing.refused("of this one"):
        thread.start()
        inside.wait(30)
    left.set()
    thread.join(30)
    assert "of the other" in found[0]
    assert torch.autograd.graph.saved_tensors_hooks.__enter__ is enter
    torch.utils.checkpoint.checkpoint(nn.Linear(2, 2), torch.ones(1, 2), use_reentrant=False)
