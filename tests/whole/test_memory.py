"""What a step holds on to: nothing of pass 1 during pass 2 but the clean states, and nothing at all afterwards."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lfu_reg import LfURegularizer
from tests.support.architectures import llama, peft_llama
from tests.support.cases import causal_loss, seeded, token_batch
from tests.support.harness import auxiliary
from tests.support.models import LLAMA, TINY

AUXILIARIES = ("lora", "steering", "weights", "random")


def make_auxiliary(name: str) -> Any:
    return name if name == "random" else auxiliary(name)


def reference(output: Tensor | tuple[Tensor, ...]) -> StorageWeakRef:
    """Of the memory, not of the Python object: autograd keeps the one alive without the other."""
    tensor = output if isinstance(output, Tensor) else output[0]  # layers of older transformers return tuples
    return StorageWeakRef(tensor.untyped_storage())


@contextmanager
def outputs_of(model: nn.Module, layers: tuple[str, ...], passes: list[list[StorageWeakRef]]) -> Iterator[None]:
    """References to every intermediate output, a list per pass; the layers' own outputs are allowed to live."""
    kept = {id(model.get_submodule(name)) for name in layers}
    # A norm's output, or what a container of layers returns, may be the hidden state itself.
    inner = [m for name, m in model.named_modules() if id(m) not in kept and not list(m.children())]

    def on_input(module: nn.Module, args: Any) -> None:
        passes.append([])

    def on_second_layer(module: nn.Module, args: Any) -> None:
        if second and second[-1] == len(passes):  # a pass that begins behind the first layer
            passes.append([])
        second.append(len(passes))

    def on_output(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and passes:
            passes[-1].append(reference(output))

    second: list[int] = []
    trunk = model.get_submodule(layers[0].rsplit(".layers.", 1)[0])
    handles = [trunk.register_forward_pre_hook(on_input)]
    handles += [model.get_submodule(layers[1]).register_forward_pre_hook(on_second_layer)]
    handles += [m.register_forward_hook(on_output) for m in inner]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("make", [llama, peft_llama], ids=["llama", "peft"])
@pytest.mark.parametrize("name", AUXILIARIES)
def test_pass_1_is_gone_when_pass_2_runs(make: Any, name: str) -> None:
    model = seeded(make)
    reg = LfURegularizer(model, make_auxiliary(name), strategy="released")
    reg(model, LLAMA.batch(), LLAMA.loss)  # the first step may check its replay
    passes: list[list[StorageWeakRef]] = []
    alive: list[list[int]] = []

    def look(module: nn.Module, args: Any) -> None:
        alive.append([sum(not ref.expired() for ref in refs) for refs in passes])

    gc.disable()
    try:
        with outputs_of(model, reg.layers, passes):
            second_block = model.get_submodule(reg.layers[1])
            handle = second_block.register_forward_pre_hook(look)
            loss = reg(model, LLAMA.batch(), LLAMA.loss)
            handle.remove()
        assert len(passes) == 2, "one clean and one perturbed pass"
        assert len(passes[0]) > 20
        # Steering leaves the first layer as it is, so pass 2 has no graph of that layer but pass 1's.
        shared = 14 if name == "steering" else 0
        assert alive[1][0] <= shared, f"{alive[1][0]} of {len(passes[0])} activations of pass 1 live in pass 2"
        loss.backward()
    finally:
        gc.enable()


@pytest.mark.parametrize("strategy", ["released", "retained"])
@pytest.mark.parametrize("name", AUXILIARIES)
def test_nothing_lives_after_backward(name: str, strategy: str) -> None:
    model = seeded(llama)
    reg = LfURegularizer(model, make_auxiliary(name), strategy=strategy)
    passes: list[list[StorageWeakRef]] = []
    states: list[StorageWeakRef] = []
    handles = [
        model.get_submodule(layer).register_forward_hook(lambda m, a, out: states.append(reference(out)))
        for layer in reg.layers
    ]
    gc.collect()
    gc.disable()
    try:
        with outputs_of(model, reg.layers, passes):
            loss = reg(model, LLAMA.batch(), LLAMA.loss)
        loss.backward()
        loss_reference = weakref.ref(loss)
        del loss
        assert loss_reference() is None
        alive = sum(not ref.expired() for refs in passes for ref in refs)
        assert alive == 0, f"{alive} activations live on"
        alive = sum(not ref.expired() for ref in states)
        assert alive == 0, f"{alive} hidden states live on"
    finally:
        gc.enable()
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("way", ["ids", "embeddings"])
@pytest.mark.parametrize("name", AUXILIARIES)
def test_the_batch_goes_with_the_step_and_the_model_with_remove(name: str, way: str) -> None:
    """Also where the user keeps the regularizer, for its metrics."""
    model, batch = seeded(llama), LLAMA.batch()

    def by_embeddings(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        given = {"inputs_embeds": model.model.embed_tokens(batch["input_ids"]), "labels": batch["labels"]}
        return model(**given).loss

    reg = LfURegularizer(model, make_auxiliary(name))
    inputs, modules = weakref.ref(batch["input_ids"]), weakref.WeakSet(model.modules())
    reg(model, batch, LLAMA.loss if way == "ids" else by_embeddings).backward()
    del batch
    gc.collect()
    assert inputs() is None, "the step's inputs live on"
    reg.remove()
    del model
    gc.collect()
    assert not list(modules), "parts of the model live on"
    assert float(reg.metrics["loss"]) > 0


@pytest.mark.parametrize("strategy", ["released", "retained"])
@pytest.mark.parametrize("name", AUXILIARIES)
def test_no_growth_over_steps(name: str, strategy: str) -> None:
    model = TINY.make()
    reg = LfURegularizer(model, make_auxiliary(name), strategy=strategy, alpha=0.05)

    def steps(number: int) -> None:
        for seed in range(number):
            reg(model, TINY.batch(seed), TINY.loss).backward()
            model.zero_grad()

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    steps(2)
    before = tensors()
    steps(20)
    # Three detached scalars a step may wait to be looked at by the diagnostics, for 50 steps at most.
    assert tensors() - before <= 3 * 20 + 2
    steps(60)
    assert tensors() - before <= 3 * 50 + 2


class SavedBytes:
    """Peak of the bytes that autograd keeps for backward passes, each storage counted once, weights left out."""

    def __init__(self, model: nn.Module) -> None:
        self.now = self.peak = 0
        self._owners: dict[int, int] = {}
        self._weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    @contextmanager
    def counting(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda packed: packed.tensor):
            yield

    def _pack(self, tensor: Tensor) -> _Packed:
        return _Packed(self, tensor)

    def add(self, storage: torch.UntypedStorage) -> int | None:
        key = storage.data_ptr()
        if key in self._weights:
            return None
        self._owners[key] = self._owners.get(key, 0) + 1
        if self._owners[key] == 1:
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
        return key

    def drop(self, key: int, size: int) -> None:
        self._owners[key] -= 1
        if self._owners[key] == 0:
            del self._owners[key]
            self.now -= size


class _Packed:
    def __init__(self, count: SavedBytes, tensor: Tensor) -> None:
        # Detached: a node that saves its own output would otherwise keep itself alive through it.
        self.tensor, self._count = tensor.detach(), count
        self._key, self._size = count.add(tensor.untyped_storage()), tensor.untyped_storage().nbytes()

    def __del__(self) -> None:
        if self._key is not None:
            self._count.drop(self._key, self._size)


SHAPES = {
    "head-heavy": {"vocab_size": 2048, "hidden_size": 32, "intermediate_size": 64},
    "block-heavy": {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 192},
}


@pytest.mark.parametrize("tuned", ["full", "peft"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", AUXILIARIES)
def test_peak_of_saved_bytes(name: str, shape: str, tuned: str) -> None:
    """At most 1.1 times that of plain SFT plus the clean states."""
    settings = SHAPES[shape]
    make = llama if tuned == "full" else peft_llama
    model = seeded(lambda: make(**settings)).float()
    batch = token_batch(2, vocab=settings["vocab_size"], shape=(4, 32))

    plain = SavedBytes(model)
    with plain.counting():
        causal_loss(model, batch).backward()
    reg = LfURegularizer(model, make_auxiliary(name), alpha=0.02)
    clean_states = len(reg.layers) * 4 * 32 * settings["hidden_size"] * 4
    for _ in range(2):
        regularized = SavedBytes(model)
        with regularized.counting():
            reg(model, batch, causal_loss).backward()
        # theta + delta takes the place of the weights, which autograd keeps without anybody counting them.
        moved = [d for d in reg.perturbation.values() if isinstance(d, torch.Tensor) and name == "weights"]
        weights = sum(d.untyped_storage().nbytes() for d in moved)
        assert plain.peak > 10 * clean_states / len(reg.layers)
        assert regularized.peak <= 1.1 * plain.peak + clean_states + weights
