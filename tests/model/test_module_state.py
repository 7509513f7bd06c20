"""What a forward changes in the modules of a model: pass 2 begins where pass 1 began, and its end is what stays."""

from __future__ import annotations

import copy
import types
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from lfu_reg import LfURegularizer
from lfu_reg.model.module_state import ModuleState
from tests.support.cases import Case, seeded
from tests.support.harness import run_pair
from tests.support.models import TINY
from tests.support.plain_models import ResidualBlock, TinyLM


class Keeping(nn.Module):
    """Keeps something of every kind, and `change` to change it in a forward."""

    def __init__(self, change: Callable[[Any], None]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("constant", torch.ones(3))
        self.register_buffer("later", None)
        self.plain = torch.zeros(2)
        self.number, self.notes, self.table, self.seen = 0, [1], {"a": 1}, {1}
        self.ordered, self.queue, self.empty = OrderedDict(a=1), deque([1]), []
        self.blank: dict[str, int] = {}
        self.generator = torch.Generator().manual_seed(3)
        self.change = change

    def forward(self) -> None:
        self.change(self)

    def state(self) -> tuple[Any, ...]:
        buffers = [None if b is None else b.tolist() for b in (self.count, self.constant, self.later, self.plain)]
        containers = [list(self.notes), dict(self.table), set(self.seen), dict(self.ordered), list(self.queue)]
        more = [
            sorted(set(vars(self)) - {"change"}),
            list(self.empty),
            dict(self.blank),
            self.generator.get_state().tolist(),
        ]
        return *buffers, *containers, *more, self.number


def replaced(module: Keeping) -> None:
    module.count = module.count + 1


def evaluated(module: Keeping) -> None:
    with torch.inference_mode():
        module.count = torch.ones(())


CHANGES: dict[str, Callable[[Any], Any]] = {
    "buffer written to": lambda m: m.count.add_(1),
    "buffer replaced": replaced,
    "buffer made": lambda m: setattr(m, "later", torch.ones(1)),
    "buffer replaced under inference_mode": evaluated,
    "plain tensor written to": lambda m: m.plain.add_(1),
    "plain tensor replaced": lambda m: setattr(m, "plain", m.plain + 1),
    "counter": lambda m: setattr(m, "number", m.number + 1),
    "attribute made": lambda m: setattr(m, "made", 1),
    "attribute deleted": lambda m: delattr(m, "number"),
    "list": lambda m: m.notes.append(2),
    "list that was empty": lambda m: m.empty.append(2),
    "dict that was empty": lambda m: m.blank.update(a=m.blank.get("a", 0) + 1),
    "dict": lambda m: m.table.update(b=2),
    "set": lambda m: m.seen.add(2),
    "ordered dict": lambda m: m.ordered.update(b=2),
    "deque": lambda m: m.queue.append(2),
    "generator": lambda m: torch.rand(3, generator=m.generator),
}


def watched(module: nn.Module) -> ModuleState:
    state = ModuleState(module)
    state.begin()
    return state


@pytest.mark.parametrize("change", CHANGES)
def test_a_second_run_starts_where_the_first_did_and_leaves_no_trace(change: str) -> None:
    module = Keeping(CHANGES[change])
    containers = module.notes, module.table, module.empty
    start = module.state()
    watch = watched(module)
    module()
    changes = watch.changes()
    end, found = (module.state() if change != "attribute deleted" else None), {}
    with changes.from_the_start():
        found["start"] = module.state()
        module()
        found["end"] = module.state() if end is not None else None
    assert found == {"start": start, "end": end}
    if end is not None:
        assert start != end
        assert module.state() == end
    else:
        assert not hasattr(module, "number")
    assert all(now is then for now, then in zip((module.notes, module.table, module.empty), containers, strict=True))


@pytest.mark.parametrize("change", CHANGES)
def test_an_exception_inside_leaves_what_the_first_run_left(change: str) -> None:
    module = Keeping(CHANGES[change])
    watch = watched(module)
    module()
    changes, end = watch.changes(), dict(vars(module))
    buffers = {name: None if b is None else b.clone() for name, b in module._buffers.items()}

    def fails() -> None:
        module()
        raise KeyError

    with pytest.raises(KeyError), changes.from_the_start():
        fails()
    assert vars(module).keys() == end.keys()
    assert all(vars(module)[name] is value for name, value in end.items())
    for name, buffer in buffers.items():
        now = module._buffers[name]
        assert now is buffer is None or torch.equal(now, buffer)


TENSORS = [change for change in CHANGES if change.startswith(("buffer", "plain"))]


@pytest.mark.parametrize("change", TENSORS)
def test_a_run_that_a_backward_repeats_leaves_no_trace_in_tensors(change: str) -> None:
    """It starts from what is there, and writes to copies: graphs may hold the tensors themselves."""
    module = Keeping(CHANGES[change])
    watch = watched(module)
    module()
    changes, end = watch.changes(), module.state()
    kept = module.count, module.plain
    with changes.on_copies():
        module()
    assert module.state() == end
    assert module.count is kept[0]
    assert module.plain is kept[1]


def test_buffers_of_a_module_of_which_one_changed() -> None:
    """All of that module's are copied: native code may have written to the others without a trace."""
    counting, still = Keeping(CHANGES["buffer written to"]), Keeping(lambda module: None)
    watch = watched(nn.ModuleList([counting, still]))
    counting(), still()
    changes = watch.changes()
    kept = counting.constant
    with changes.on_copies():
        assert counting.constant is not kept
        counting.constant.add_(1)
        untouched = still.constant
    assert counting.constant is kept
    assert kept.tolist() == [1.0] * 3
    assert still.constant is untouched
    assert changes.late == []


def test_only_known_writers_are_copied_and_others_are_named() -> None:
    """From the second forward on; a buffer that is replaced is there still."""
    for change, late in (("buffer written to", ["count"]), ("buffer replaced", [])):
        module = Keeping(lambda module: None)
        state = watched(module)
        module()
        state.changes()
        for expected in (late, []):
            state.begin()
            CHANGES[change](module)
            assert state.changes().late == expected


NESTED: dict[str, Callable[[Any], Any]] = {
    "config": lambda m: setattr(m.config, "number", m.config.number + 1),
    "dict in a dict": lambda m: m.nested["a"].update(b=2),
    "tensor in a dict": lambda m: m.nested["t"].add_(1),
    "list in a config": lambda m: m.config.notes.append(1),
    "numpy generator": lambda m: m.numpy.random(),
}


@pytest.mark.parametrize("change", NESTED)
def test_what_is_nested_starts_anew_as_well(change: str) -> None:
    module = Keeping(NESTED[change])
    module.config = types.SimpleNamespace(number=0, notes=[])
    module.nested = {"a": {"b": 1}, "t": torch.zeros(2)}
    module.numpy = numpy.random.default_rng(0)

    def seen() -> object:
        nested = module.nested["a"], module.nested["t"].tolist()
        return copy.deepcopy((vars(module.config), nested, module.numpy.bit_generator.state))

    start = seen()
    state = watched(module)
    module()
    end, changes = seen(), state.changes()
    assert end != start
    with changes.from_the_start():
        assert seen() == start
        module()
        assert seen() == end
    assert seen() == end


def test_nothing_changes() -> None:
    """Also in buffers that an evaluation has left there, which count no versions."""
    still = Keeping(lambda module: None)
    evaluated(still)
    watch = watched(still)
    still()
    changes = watch.changes()
    assert (changes.late, changes.weights, changes.found) == ([], [], [])
    assert not changes.in_containers_of([still])


@pytest.mark.parametrize("change", ["list", "list that was empty", "dict", "set", "ordered dict", "deque"])
def test_containers_that_were_written_to_are_told(change: str) -> None:
    module, other = Keeping(CHANGES[change]), Keeping(lambda module: None)
    watch = watched(nn.ModuleList([module, other]))
    module(), other()
    changes = watch.changes()
    assert changes.in_containers_of([module])
    assert not changes.in_containers_of([other])


@pytest.mark.parametrize("trained", [True, False])
def test_weights_that_are_written_to_are_known(trained: bool) -> None:
    module = Keeping(lambda module: None)
    module.weight.requires_grad_(trained)
    watch = watched(module)
    with torch.no_grad():
        module.weight.clamp_(0, 1)
    assert [weight is module.weight for weight, _ in watch.changes().weights] == [True]


# ------------------------------------------------------------------ in a step


class CountingBlock(ResidualBlock):
    """Scales by how often it ran, by a draw of its own, and by a list that grows."""

    def __init__(self, width: int, kind: str) -> None:
        super().__init__(width)
        self.kind, self.number, self.notes, self.table = kind, 0, [], {}
        self.generator = torch.Generator().manual_seed(3)
        self.plain = torch.zeros(())
        self.register_buffer("count", torch.zeros(()))

    def forward(self, hidden: Tensor) -> Tensor:
        if self.kind == "generator":
            return super().forward(hidden) * (1 + float(torch.rand((), generator=self.generator)))
        if self.kind == "counter":
            self.number += 1
        elif self.kind == "list":
            self.notes.append(1)
        elif self.kind == "dict":
            self.table[len(self.table)] = 1
        elif self.kind == "buffer":
            self.count += 1
        elif self.kind == "plain tensor":
            self.plain += 1
        return super().forward(hidden) * (1 + 0.3 * self.runs)

    @property
    def runs(self) -> int:
        return self.number + len(self.notes) + len(self.table) + int(self.count) + int(self.plain)


def counting_model(kind: str) -> TinyLM:
    model = TinyLM()
    model.blocks = nn.ModuleList(CountingBlock(8, kind) for _ in range(3))
    return model


def spectral() -> TinyLM:
    model = TinyLM()
    for block in model.blocks:
        spectral_norm(block.up)
    return model


KINDS = ("counter", "list", "dict", "buffer", "plain tensor", "generator")


@pytest.mark.parametrize("strategy", ["released", "retained"])
@pytest.mark.parametrize("name", ["steering", "weights"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_counts_once(kind: str, name: str, strategy: str) -> None:
    """Without a perturbation both passes are the same, and the state afterwards is that of one forward."""
    model, plain = (seeded(lambda: counting_model(kind)) for _ in range(2))
    with LfURegularizer(model, name, alpha=0.0, strategy=strategy) as reg:
        for _ in range(3):
            reg(model, TINY.batch(), TINY.loss).backward()
            TINY.loss(plain, TINY.batch())
            assert float(reg.metrics["consistency_loss"]) == 0
            for block, twin in zip(model.blocks, plain.blocks, strict=True):
                assert block.runs == twin.runs
                assert torch.equal(block.generator.get_state(), twin.generator.get_state())


BUFFERS = {"batch norm": lambda: TinyLM(batch_norm=True), "spectral norm": spectral}


@pytest.mark.parametrize("name", ["steering", "weights"])
@pytest.mark.parametrize("kind", BUFFERS)
def test_norms_that_keep_statistics(kind: str, name: str) -> None:
    case = Case(kind, lambda: seeded(BUFFERS[kind]), TINY.batch, TINY.loss, TINY.mask, TINY.layers, 6)
    model, plain = case.make(), case.make()
    with LfURegularizer(model, name, alpha=0.05) as reg:
        for seed in range(2):
            reg(model, TINY.batch(seed), TINY.loss).backward()
            TINY.loss(plain, TINY.batch(seed))
    for key, buffer in plain.named_buffers():
        assert torch.equal(buffer, dict(model.named_buffers())[key]), key
    if kind == "batch norm":
        run_pair(case, name).check()
