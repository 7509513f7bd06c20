"""Models whose own loop does something between the layers that values at one step cannot show: nothing is shared.

Compared with retained graphs, which share nothing, over steps in which the weights move.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lfu_reg import LfURegularizer
from lfu_reg.model.checkpoints import can_tell_who_saves
from tests.support.cases import Batch, seeded, token_batch
from tests.support.compare import assert_same_gradients, gradients_of
from tests.support.models import PEFT, TINY
from tests.support.plain_models import ResidualBlock, TinyLM

Loop = Callable[["LoopLM", int, nn.Module, Tensor], Tensor]
WIDTH = 8


@dataclass
class Context:
    """An argument that nobody looks into."""

    bias: Tensor


class AnyBlock(ResidualBlock):
    """A block with one more argument."""

    clamped = False
    memory: dict[str, Tensor] | None = None

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.gate = nn.Parameter(torch.zeros(width))

    def forward(self, hidden: Tensor, extra: Any = None) -> Tensor:  # type: ignore[override]
        if self.clamped:
            with torch.no_grad():
                self.up.weight.clamp_(-0.3, 0.3)
        if self.memory is not None and "first" in self.memory and self is not self.memory["owner"]:  # type: ignore[comparison-overlap]
            hidden = hidden + 0.1 * self.memory["first"]
        if isinstance(extra, tuple):
            hidden = hidden + self.gate * extra[0].clone()  # which may be written to later
        elif isinstance(extra, Context):
            hidden = hidden + extra.bias
        elif isinstance(extra, Tensor):
            hidden = hidden + extra
        result = super().forward(hidden)
        if self.memory is not None and self is self.memory["owner"]:  # type: ignore[comparison-overlap]
            self.memory["first"] = result
        return result


class LoopLM(TinyLM):
    """`loop` calls each block."""

    def __init__(self, loop: Loop, **block: Any) -> None:
        super().__init__(depth=4)
        self.blocks = nn.ModuleList(AnyBlock(WIDTH) for _ in range(4))
        self.gate = nn.Parameter(torch.zeros(WIDTH))
        self.table = nn.ParameterList(torch.zeros(WIDTH) for _ in range(4))
        self.loop = loop
        for part in self.blocks:
            for name, value in block.items():
                setattr(part, name, value)

    def body(self, hidden: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            hidden = self.loop(self, number, block, hidden)
        return self.norm(hidden.flatten(0, 1)).view_as(hidden)


def hook_on_the_cut(model: LoopLM, number: int, block: nn.Module, hidden: Tensor) -> Tensor:
    hidden = block(hidden)
    if number == 0:
        hidden.register_hook(lambda grad: grad * 0.5)
    return hidden


def hook_on_the_cut_later(model: LoopLM, number: int, block: nn.Module, hidden: Tensor) -> Tensor:
    result = block(hidden)
    if number == 1:  # the next layer has begun, and ended
        hidden.register_hook(lambda grad: grad * 0.5)
    return result


def hook_between(model: LoopLM, number: int, block: nn.Module, hidden: Tensor) -> Tensor:
    hidden = block(hidden)
    if number == 2:
        hidden.register_hook(lambda grad: grad * 0.5)
    return hidden


def detached_in_place(model: LoopLM, number: int, block: nn.Module, hidden: Tensor) -> Tensor:
    hidden = block(hidden)
    return hidden.detach_() if number == 2 else hidden


def zero_gate(model: LoopLM, number: int, block: nn.Module, hidden: Tensor) -> Tensor:
    hidden = block(hidden)
    return hidden.add_(model.gate) if number == 2 else hidden


def memory_through_a_zero_gate(model: LoopLM, number: int, block: nn.Module, hidden: Tensor) -> Tensor:
    return block(hidden, (hidden.detach().mean(1, keepdim=True),))


def bias_in_the_graph(model: LoopLM, number: int, block: nn.Module, hidden: Tensor) -> Tensor:
    """For all layers but the first, which is below the cut; the backward of pass 1 frees its graph."""
    if number == 0:
        model.bias = torch.tanh(model.table[0])
        return block(hidden)
    return block(hidden, model.bias)


def written_on(model: LoopLM, number: int, block: nn.Module, hidden: Tensor) -> Tensor:
    """Later layers read what earlier ones have noted down; nothing at first, as the gate is closed."""
    if number == 0:
        model.notes = hidden.new_zeros(1, 1, WIDTH)
    hidden = block(hidden, (model.notes,))
    model.notes.copy_(hidden.detach().mean((0, 1), keepdim=True))
    return hidden


def written_at_last(model: LoopLM, number: int, block: nn.Module, hidden: Tensor) -> Tensor:
    """Each layer has read them before, as zeros."""
    if number == 0:
        model.notes = hidden.new_zeros(1, 1, WIDTH)
    hidden = block(hidden, (model.notes,))
    if number == 3:
        model.notes.copy_(hidden.detach().mean((0, 1), keepdim=True))
    return hidden


def bias_in_an_object(model: LoopLM, number: int, block: nn.Module, hidden: Tensor) -> Tensor:
    return block(hidden, Context(torch.tanh(model.table[number])))


def written_into_an_object(model: LoopLM, number: int, block: nn.Module, hidden: Tensor) -> Tensor:
    if number == 0:
        model.context = Context(hidden.new_zeros(WIDTH))
    return block(hidden, model.context)


def plain(model: LoopLM, number: int, block: nn.Module, hidden: Tensor) -> Tensor:
    return block(hidden)


class NotingBlock(AnyBlock):
    """Leaves something for later blocks in what it is given."""

    def forward(self, hidden: Tensor, extra: Any = None) -> Tensor:  # type: ignore[override]
        result = super().forward(hidden, extra)
        extra.bias = result.detach().mean((0, 1))
        return result


class HookedBlock(AnyBlock):
    """Puts a hook on what it returns."""

    def forward(self, hidden: Tensor, extra: Any = None) -> Tensor:  # type: ignore[override]
        result = super().forward(hidden, extra)
        result.register_hook(lambda grad: grad * 0.5)
        return result


def kept_for_others() -> LoopLM:
    model = LoopLM(plain)
    memory: dict[str, Any] = {"owner": model.blocks[0]}
    for block in model.blocks:
        block.memory = memory
    return model


def with_noting_blocks() -> LoopLM:
    model = LoopLM(written_into_an_object)
    for block in model.blocks:
        block.__class__ = NotingBlock
    return model


def with_hooked_blocks() -> LoopLM:
    model = LoopLM(plain)
    for block in model.blocks:
        block.__class__ = HookedBlock
    return model


def with_a_gate_in_a_hook() -> LoopLM:
    """It was there before the regularizer's: what is perturbed is not what leaves the layer."""
    model = LoopLM(plain)
    model.blocks[0].register_forward_hook(lambda module, args, output: output * (1 + model.gate))
    return model


def with_a_shared_map() -> LoopLM:
    model = LoopLM(plain)
    model.blocks[3].up = model.blocks[0].up
    model.embed.requires_grad_(False)
    model.blocks[0].requires_grad_(False)
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], str, Any]] = {
    "hook on the cut": (lambda: LoopLM(hook_on_the_cut), "steering", "all"),
    "hook on the cut, later": (lambda: LoopLM(hook_on_the_cut_later), "steering", "all"),
    "gate in another one's hook": (with_a_gate_in_a_hook, "steering", "all"),
    "hook by the block": (with_hooked_blocks, "steering", "all"),
    "hook between": (lambda: LoopLM(hook_between), "steering", "all"),
    "detached in place": (lambda: LoopLM(detached_in_place), "steering", "all"),
    "zero gate": (lambda: LoopLM(zero_gate), "steering", [1, 3]),
    "zero gate, LoRA": (lambda: LoopLM(zero_gate), "lora", [1, 3]),
    "memory": (lambda: LoopLM(memory_through_a_zero_gate), "steering", "all"),
    "a bias in the graph": (lambda: LoopLM(bias_in_the_graph), "lora", [1, 3]),
    "notes that are written on": (lambda: LoopLM(written_on), "steering", "all"),
    "notes that are written at last": (lambda: LoopLM(written_at_last), "steering", "all"),
    "an object's bias": (lambda: LoopLM(bias_in_an_object), "steering", "all"),
    "written into an object": (with_noting_blocks, "steering", "all"),
    "weights written to": (lambda: LoopLM(plain, clamped=True), "steering", "all"),
    "kept for others": (kept_for_others, "steering", "all"),
    "a shared linear map": (with_a_shared_map, "lora", [2, 3]),
}


def with_closed_gates(make: Callable[[], nn.Module]) -> nn.Module:
    """A model whose gates are zero at the first step, at which the way is checked by values."""
    model = seeded(make)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name:
                parameter.zero_()
    return model


def trained(model: nn.Module, name: str, batches: list[Batch], **options: Any) -> dict[str, Tensor | None]:
    """Gradients of the last of some steps of gradient descent."""
    with LfURegularizer(model, name, alpha=0.01, lam=0.7, seed=1, **options) as reg:
        for batch in batches:
            model.zero_grad()
            torch.manual_seed(5)
            reg(model, batch, TINY.loss).backward()
            gradients = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.1 * parameter.grad
    return gradients


@pytest.mark.filterwarnings("ignore::lfu_reg.LfUWarning")
@pytest.mark.parametrize("label", [label for label in MODELS if label != "weights written to"])
def test_gradients_are_those_of_retained_graphs(label: str) -> None:
    make, name, layers = MODELS[label]
    batches = [token_batch(seed) for seed in range(12)]  # the first ten steps take the terms apart to compare them
    got = trained(with_closed_gates(make), name, batches, layers=layers)
    want = trained(with_closed_gates(make), name, batches, layers=layers, strategy="retained")
    assert_same_gradients(got, want)


def clamping(model: LoopLM, number: int, block: Any, hidden: Tensor) -> Tensor:
    with torch.no_grad():
        block.up.weight.clamp_(-0.3, 0.3)
    return block(hidden)


@pytest.mark.filterwarnings("ignore:This step is plain SFT. the forward wrote to:lfu_reg.LfUWarning")
@pytest.mark.parametrize("make", [MODELS["weights written to"][0], lambda: LoopLM(clamping)], ids=["block", "loop"])
def test_a_forward_that_writes_to_the_weights(make: Callable[[], nn.Module]) -> None:
    """Retained graphs cannot have it; a second run of the first block cannot either, before the prefix was used."""
    got = trained(seeded(make), "steering", [token_batch(seed) for seed in range(3)])
    assert all(g is None or torch.isfinite(g).all() for g in got.values())


def test_draws_that_start_later() -> None:
    """Dropout is off at the step at which the way is checked; the loop draws between the blocks."""

    def drawing(model: LoopLM, number: int, block: nn.Module, hidden: Tensor) -> Tensor:
        torch.rand(())
        return block(hidden)

    found = []
    for strategy in ("released", "retained"):
        model: Any = seeded(lambda: LoopLM(drawing))
        with LfURegularizer(model, "steering", alpha=0.01, lam=0.7, strategy=strategy) as reg:
            for step in range(2):
                for block in model.blocks:
                    block.drop.p = 0.3 * step
                model.zero_grad()
                torch.manual_seed(step)
                reg(model, TINY.batch(), TINY.loss).backward()
        found.append(gradients_of(model))
    assert_same_gradients(found[0], found[1])


@pytest.mark.parametrize("fraction", [0.2, 0.5])
def test_samples_of_a_batch_as_large_as_the_sequence(fraction: float) -> None:
    """A table over positions looks like one entry per sample, at a step at which nothing would be checked."""

    def with_positions(model: LoopLM, number: int, block: nn.Module, hidden: Tensor) -> Tensor:
        if number == 0:
            model.positions = torch.linspace(0, 1, hidden.shape[1] * WIDTH, dtype=hidden.dtype).view(-1, WIDTH)
        return block(hidden, model.positions)

    batches = [token_batch(seed, shape=(rows, 6)) for seed, rows in enumerate((4, 6, 4))]
    options: dict[str, Any] = {"batch_fraction": fraction}
    got, want = (
        trained(seeded(lambda: LoopLM(with_positions)), "steering", batches, strategy=strategy, **options)
        for strategy in ("released", "retained")
    )
    assert_same_gradients(got, want)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_copy_made_by_the_loss_function(when: str) -> None:
    """A copy of the model that is made within a step is a plain one, and can be pickled."""
    import pickle

    copies: list[nn.Module] = []

    def loss(model: Any, batch: Batch) -> Tensor:
        if when == "before":
            copies.append(copy.deepcopy(model))
            pickle.dumps(model)
        result = PEFT.loss(model, batch)
        if when == "after":
            copies.append(copy.deepcopy(model))
        return result

    model = PEFT.make()
    with LfURegularizer(model, "lora", alpha=0.01) as reg:
        reg(model, PEFT.batch(), loss).backward()
    want = PEFT.loss(PEFT.make(), PEFT.batch())
    torch.testing.assert_close(PEFT.loss(copies[0], PEFT.batch()), want)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.skipif(not can_tell_who_saves(), reason="torch 2.6 does not tell who saves: no block is reused")
def test_code_that_needs_what_a_block_leaves_behind_has_it_run() -> None:
    notes: list[int] = []
    model = TINY.make()
    block = model.blocks[0]
    plain = block.forward

    def noting(*args: Any) -> Any:
        notes.append(1)
        return plain(*args)

    def loss(model: Any, batch: Batch) -> Tensor:
        notes.clear()
        return TINY.loss(model, batch) * notes[0]

    block.forward = noting
    with LfURegularizer(model, "steering", layers="late", leave_early=False, alpha=0.1, lam=1.0) as reg:
        assert list(reg._attached.reused.blocks)
        reg(model, TINY.batch(), loss)
        assert float(reg.metrics["consistency_loss"]) > 0
        assert not reg._attached.reused.blocks
