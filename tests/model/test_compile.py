"""torch.compile: whole model, in place, block by block, around the loss; compiled before, after, long before attaching.

Backend "eager" runs the very operations of the uncompiled model, so gradients have to agree to the last bits; and
dynamo, which decides whether hooks are seen, is the same for every backend.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from lfu_reg import LfURegularizer
from tests.support.cases import Case, seeded, token_batch
from tests.support.compare import assert_same_gradients, close
from tests.support.harness import auxiliary
from tests.support.models import LLAMA, PEFT, TINY
from tests.support.plain_models import TinyLM
from tests.support.refusals import says
from tests.support.snapshots import Snapshot

AUXILIARIES = ("lora", "steering", "weights")
WAYS = ("whole", "in place", "regional", "loss", "forward")
WHEN = ("after attaching", "before attaching", "and run before attaching")
LEARNING_RATE = 0.05
TELLS_REGIONS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 7)


@pytest.fixture(autouse=True)
def no_graphs() -> Any:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(model: nn.Module, case: Case, way: str, backend: Any, **options: Any) -> tuple[Any, Callable[..., Tensor]]:
    """The model to give to the regularizer, and the loss function."""
    compile_options = {"backend": backend, **options}
    if way == "whole":
        return torch.compile(model, **compile_options), case.loss
    if way == "in place":
        model.compile(**compile_options)
    if way == "regional":
        for name in case.layers:
            model.get_submodule(name).compile(**compile_options)
    if way == "loss":
        return model, torch.compile(case.loss, **compile_options)
    if way == "forward":
        forward = torch.compile(lambda **inputs: model(**inputs), **compile_options)

        def loss(_: Any, batch: Any) -> Tensor:
            return case.loss(lambda input_ids: forward(input_ids=input_ids), batch)

        return model, loss
    return model, case.loss


class Run:
    """Some training steps, with their losses and gradients.

    Args:
        case: the model, its batches and loss.
        name: of the auxiliary.
        way: of compiling; "none" is the reference.
        when: the model is compiled.
        backend: of torch.compile.
        make: instead of the case's.
        options: of the regularizer.
    """

    def __init__(
        self,
        case: Case,
        name: str,
        way: str = "none",
        when: str = WHEN[1],
        backend: str = "eager",
        make: Callable[[], nn.Module] | None = None,
        compile_options: Any = None,
        **options: Any,
    ) -> None:
        self.graphs: list[int] = []  # how many had been compiled after each step
        self.losses: list[Tensor] = []
        self.consistency = 0.0
        self.gradients: list[dict[str, Tensor | None]] = []
        self.case, self.model = case, (make or case.make)()
        self.counter = CompileCounterWithBackend(backend)
        settings = {"alpha": 0.05, "lam": 0.7, "seed": 3, **options}
        if when == WHEN[0]:
            self.reg = LfURegularizer(self.model, auxiliary(name), **settings)
        self.run, self.loss = compiled(self.model, case, way, self.counter, **(compile_options or {}))
        if when == WHEN[2]:
            self.loss(self.run, case.batch(9)).backward()
            with torch.no_grad():
                self.loss(self.run, case.batch(9))
            self.model.zero_grad()
        if when != WHEN[0]:
            self.reg = LfURegularizer(self.run, auxiliary(name), **settings)

    def steps(self, count: int, evaluate_every: int = 2, batch: Callable[[int], Any] | None = None) -> Run:
        torch.manual_seed(5)
        for step in range(count):
            loss = self.reg(self.run, (batch or self.case.batch)(step), self.loss)
            loss.backward()
            self.losses.append(loss.detach())
            self.consistency = max(self.consistency, float(self.reg.metrics.get("consistency_loss", 0)))
            trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
            self.gradients.append({n: None if p.grad is None else p.grad.clone() for n, p in trained.items()})
            with torch.no_grad():
                for parameter in trained.values():
                    parameter -= LEARNING_RATE * (0 if parameter.grad is None else parameter.grad)
            self.model.zero_grad()
            if step % evaluate_every == evaluate_every - 1:
                self.model.eval()
                with torch.no_grad():
                    self.losses.append(self.reg(self.run, self.case.batch(9), self.loss))
                self.model.train()
            self.graphs.append(self.counter.frame_count)
        return self

    def equals(self, want: Run) -> None:
        for got, expected in zip(self.losses, want.losses, strict=True):
            close(got, expected)
        for got, expected in zip(self.gradients, want.gradients, strict=True):
            assert_same_gradients(got, expected)
        assert self.consistency > 0
        assert self.counter.frame_count > 0, "nothing was compiled"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("name", "when"),
    [(name, when) for name in AUXILIARIES for when in WHEN if name == "steering" or when == WHEN[2]],
)
def test_equals_the_uncompiled_run(name: str, when: str, way: str) -> None:
    Run(TINY, name, way, when).steps(2).equals(Run(TINY, name).steps(2))


@pytest.mark.parametrize(("name", "way"), [("lora", "regional"), ("steering", "whole"), ("weights", "loss")])
def test_retained(name: str, way: str) -> None:
    options = {"strategy": "retained", "stop_gradient": "none"}
    Run(TINY, name, way, **options).steps(2).equals(Run(TINY, name, **options).steps(2))


@pytest.mark.parametrize(("name", "way"), [("lora", "whole"), ("steering", "loss"), ("weights", "regional")])
def test_aot_autograd(name: str, way: str) -> None:
    """Graphs with a backward of their own, as every real backend has them."""
    Run(TINY, name, way, backend="aot_eager").steps(2).equals(Run(TINY, name).steps(2))


@pytest.mark.parametrize(
    ("case", "name", "way"),
    [(LLAMA, "weights", "regional"), (PEFT, "steering", "whole")],
    ids=lambda v: getattr(v, "name", v),
)
def test_transformers(case: Case, name: str, way: str) -> None:
    Run(case, name, way).steps(1).equals(Run(case, name).steps(1))


def test_gradient_checkpointing() -> None:
    def make() -> nn.Module:
        model = LLAMA.make()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model

    Run(LLAMA, "lora", "whole", make=make).steps(1).equals(Run(LLAMA, "lora").steps(1))


@pytest.mark.parametrize(
    ("way", "options"),
    [("whole", {"ascent_steps": 2}), ("loss", {"batch_fraction": 0.67}), ("regional", {"every": 2})],
    ids=str,
)
def test_other_settings(way: str, options: dict[str, Any]) -> None:
    Run(TINY, "lora", way, **options).steps(2).equals(Run(TINY, "lora", **options).steps(2))


@pytest.mark.parametrize("dynamic", [None, True], ids=["fixed", "dynamic"])
@pytest.mark.parametrize(("name", "way"), [("lora", "whole"), ("steering", "in place"), ("weights", "regional")])
def test_recompilations(name: str, way: str, dynamic: bool | None) -> None:
    """Over 20 steps, with an evaluation after every fifth; lengths of the batches change where shapes are dynamic."""

    def batch(step: int) -> Any:
        return token_batch(step, shape=(3, 7 + step % 4 if dynamic else 7))

    run = Run(TINY, name, way, compile_options={"dynamic": dynamic}).steps(20, 5, batch)
    assert run.graphs[-1] - run.graphs[0] <= 3, run.graphs


class Nested(nn.Module):
    """The smallest module that holds all layers is not the root."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = TinyLM()

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.inner(input_ids)


@pytest.mark.parametrize("way", WAYS)
def test_pass_2_runs_compiled(way: str) -> None:
    """A trunk that is compiled only as a part of the model runs uncompiled when called alone: not to be replayed."""
    if not TELLS_REGIONS and way in ("whole", "in place", "forward"):
        pytest.skip("torch 2.6 does not tell what runs compiled: such a trunk is replayed uncompiled")
    case = replace(TINY, make=lambda: seeded(Nested), layers=tuple(f"inner.{name}" for name in TINY.layers))
    runs: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            runs.append(1)
            return graph(*args)

        return run

    model = case.make()
    run, loss = compiled(model, case, way, backend)
    reg = LfURegularizer(run, auxiliary("steering"))
    reg(run, case.batch(), loss)
    runs.clear()
    reg(run, case.batch(), loss)
    blocks, rest = len(case.layers), 2  # what pass 1 runs after the blocks, and pass 2 need not
    assert len(runs) >= 2 * blocks, runs
    if way in ("whole", "in place", "regional"):
        assert len(runs) <= 2 * (blocks + rest)


@pytest.mark.parametrize("layers", [[0], [2]], ids=str)
@pytest.mark.parametrize("name", AUXILIARIES)
def test_one_of_several_compiled_siblings(name: str, layers: list[int]) -> None:
    """Blocks share graphs: the one without hooks must not serve the one that has some."""
    Run(TINY, name, "regional", layers=layers).steps(4).equals(Run(TINY, name, layers=layers).steps(4))


@pytest.mark.parametrize("way", ["whole", "in place", "regional"])
def test_remove(way: str) -> None:
    run = Run(TINY, "lora", way)
    run.reg.remove()
    before = Snapshot.of(run.model)
    want = run.loss(run.run, TINY.batch(4))
    reg = LfURegularizer(run.model, auxiliary("lora"))
    reg(run.run, TINY.batch(), run.loss)
    idle = run.loss(run.run, TINY.batch(4))
    reg.remove()
    before.check(run.model)
    assert torch.equal(idle, want)
    assert torch.equal(run.loss(run.run, TINY.batch(4)), want)
    graphs = run.counter.frame_count
    run.loss(run.run, TINY.batch(4))
    assert run.counter.frame_count == graphs


def test_outside_of_a_step_the_graph_stays_whole() -> None:
    run = Run(TINY, "lora", "whole", compile_options={"fullgraph": True})
    with torch.no_grad():
        run.reg(run.run, TINY.batch(), run.loss)
    with run.reg.disabled():
        run.reg(run.run, TINY.batch(), run.loss).backward()


@pytest.mark.parametrize("name", AUXILIARIES)
def test_fullgraph_is_refused(name: str) -> None:
    run = Run(TINY, name, "whole", compile_options={"fullgraph": True})
    before = Snapshot.of(run.model)
    with pytest.raises(RuntimeError, match=says("fullgraph=True", "block.compile()")):
        run.reg(run.run, TINY.batch(), run.loss)
    run.reg.remove()  # until then hooks stay, as with everything that is compiled
    before.check(run.model)


def test_the_unwrapped_module_is_attached() -> None:
    model = TINY.make()
    wrapper = torch.compile(model, backend="eager")
    reg = LfURegularizer(wrapper, "steering")
    assert reg.layers == TINY.layers
    assert float(reg(model, TINY.batch(), TINY.loss).detach()) > 0


@pytest.mark.parametrize("way", ["regional", "in place"])
def test_graphs_of_another_model_of_the_same_classes(way: str) -> None:
    """Its graphs have no guard on hooks, so torch takes them for the attached model: an error, never a silent no-op."""
    run = Run(TINY, "lora", way)
    other = TINY.make()
    compiled(other, TINY, way, run.counter)

    def train_both() -> None:
        for step in range(4):
            TINY.loss(other, TINY.batch(step)).backward()
            run.reg(run.run, TINY.batch(step), run.loss).backward()

    with pytest.raises(RuntimeError, match=says("torch.compiler.reset()", "skip_nnmodule_hook_guards")):
        train_both()
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):  # the cure that the error names
        torch.compiler.reset()
        train_both()


def test_copies_of_a_compiled_model_carry_inert_hooks() -> None:
    """Its hooks stay between steps, and are of the model that was attached."""
    run = Run(TINY, "steering", "in place").steps(1)
    hooks = [hook for module in copy.deepcopy(run.model).modules() for hook in module._forward_hooks.values()]
    assert hooks
    assert all(hook.listener is None for hook in hooks)


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")


@needs_compiler
def test_inductor() -> None:
    """With dropout: its masks are inductor's own, so pass 2 must run in the same graphs to draw them again."""
    run = Run(TINY, "weights", "whole", backend="inductor", make=lambda: seeded(lambda: TinyLM(dropout=0.5)), alpha=0.0)
    loss = run.reg(run.run, TINY.batch(), run.loss)
    loss.backward()
    assert float(run.reg.metrics["consistency_loss"]) == 0
    Run(TINY, "lora", "regional", backend="inductor").steps(1).equals(Run(TINY, "lora").steps(1))


@needs_compiler
def test_donated_buffers() -> None:
    """A retained graph has two backwards, which inductor refuses for graphs compiled without knowing."""
    options = {"strategy": "retained"}
    Run(TINY, "steering", "regional", backend="inductor", **options).steps(1).equals(
        Run(TINY, "steering", **options).steps(1)
    )
    run = Run(TINY, "steering", "regional", backend="inductor", **options)
    torch.compiler.reset()
    with run.reg.disabled():
        run.reg(run.run, TINY.batch(), run.loss).backward()
    with pytest.raises(RuntimeError, match=says("donated_buffer = False", "released")):
        run.reg(run.run, TINY.batch(), run.loss)
