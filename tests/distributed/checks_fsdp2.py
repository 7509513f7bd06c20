"""FSDP2 (`fully_shard`) on two processes."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

from benchmarks.sharded.recorder import Collectives
from lfu_reg import LfURegularizer, LfUWarning
from lfu_reg.step.strength import FIRST_STEPS
from tests.distributed.examples import run_example
from tests.distributed.reference import (
    both_terms,
    expected,
    length,
    mean,
    parameters_of,
    regularizer,
    train,
    whole,
)
from tests.distributed.sharding import blocks_of, gradients_of, same_on_all_ranks, shard
from tests.support.cases import Batch, Case, next_token_loss, seeded, token_batch
from tests.support.compare import assert_same_gradients, mismatch
from tests.support.harness import a_matrices_of
from tests.support.models import LLAMA, PEFT, TINY
from tests.support.plain_models import FailingBackward, TinyLM
from tests.support.refusals import says

ADAMW = functools.partial(torch.optim.AdamW, lr=1e-2, foreach=False)
KEEP: dict[str, Any] = {"reshard_after_forward": False}
_REFERENCES: dict[str, Any] = {}


def train_sharded(
    case: Case,
    name: str,
    model: nn.Module,
    *,
    steps: int = 2,
    micro: int = 1,
    clip: float | None = None,
    batch_of: Any = None,
    extra: Mapping[str, Any] | None = None,
    optimizer: Any = ADAMW,
    synchronise_always: bool = False,
    **options: Any,
) -> tuple[dict[str, Tensor | None], dict[str, Tensor]]:
    """As `reference.train`, on this rank's batches."""
    batch_of = batch_of or (lambda rank, number: case.batch(10 * number + rank))
    opt = optimizer(model.parameters())
    gradients: dict[str, Tensor | None] = {}
    with regularizer(model, name, **options) as reg:
        for step in range(steps):
            opt.zero_grad()
            for number in range(step * micro, (step + 1) * micro):
                model.set_requires_gradient_sync(synchronise_always or number == (step + 1) * micro - 1)
                (reg(model, batch_of(dist.get_rank(), number), case.loss, **(extra or {})) / micro).backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            gradients = {n: None if g is None else g.clone() for n, g in gradients_of(model).items()}
            opt.step()
    return gradients, parameters_of(model)


def compare(
    case: Case,
    name: str,
    model: nn.Module | None = None,
    *,
    sharded_only: Mapping[str, Any] | None = None,
    plain_only: Mapping[str, Any] | None = None,
    **same: Any,
) -> None:
    """Train sharded and in one process, and compare gradients and weights."""
    same = {"steps": 2, "optimizer": ADAMW, **same}
    gradients, parameters = train_sharded(
        case, name, shard(case.make()) if model is None else model, **same, **(sharded_only or {})
    )
    key = repr((case.name, name, sorted(same.items()), plain_only))
    if key not in _REFERENCES:
        _REFERENCES[key] = train(case, name, **same, **(plain_only or {}))
    assert_same_gradients(gradients, _REFERENCES[key][0])
    # Adam divides by gradients that are zero but for rounding (attention's key bias).
    assert mismatch(parameters, _REFERENCES[key][1])[0] < 1e-6


def check_against_the_oracle() -> None:
    for name in ("lora", "steering", "weights"):
        for options in ({}, KEEP):
            model = shard(TINY.make(), **options)
            before = {n: p.full_tensor().clone() for n, p in model.named_parameters()}
            reg = regularizer(model, name)
            reg(model, TINY.batch(dist.get_rank()), TINY.loss).backward()
            # The shards' gradients are averaged already, so that all ranks move the weights along one direction.
            want = expected(TINY, name, [a_matrices_of(reg)] * 2, shared=name == "weights")
            assert_same_gradients(gradients_of(model), want)
            assert all(torch.equal(p.full_tensor(), before[n]) for n, p in model.named_parameters())


def check_shared_ascent_against_the_oracle() -> None:
    for name in ("lora", "steering"):
        model = shard(TINY.make())
        reg = regularizer(model, name, seed=3 + dist.get_rank(), sync_perturbation=True)
        reg(model, TINY.batch(dist.get_rank()), TINY.loss).backward()
        assert_same_gradients(gradients_of(model), expected(TINY, name, [a_matrices_of(reg)] * 2, shared=True))


def check_strength() -> None:
    """From the lengths of the gradients that are reduced over ranks; lam and alpha are the same on all of them."""
    for name in ("lora", "steering"):
        model = shard(TINY.make())
        reg = regularizer(model, name, lam=None, strength=0.8)
        reg(model, TINY.batch(dist.get_rank()), TINY.loss).backward()
        sft, cons = (mean(term) for term in both_terms(TINY, name, [a_matrices_of(reg)] * 2))
        lam = 0.8 * length(sft) / length(cons)
        assert float(reg.metrics["lam"]) == pytest.approx(lam, rel=1e-9)
        assert_same_gradients(gradients_of(model), {n: g + lam * cons[n] for n, g in sft.items()})  # type: ignore[operator]
        assert float(reg.metrics["gradient_ratio"]) == pytest.approx(0.8, rel=1e-6)
        assert -1 < float(reg.metrics["gradient_cosine"]) < 1
        reg.remove()


def check_alpha_comes_nearer_from_step_to_step() -> None:
    """No rank runs a further forward for it."""
    for name in ("lora", "steering", "weights"):
        model = shard(TINY.make())
        with regularizer(model, name, alpha=None, lam=None, strength=1.0) as reg:
            for number in range(6):
                reg(model, TINY.batch(10 * number + dist.get_rank()), TINY.loss).backward()
                known: list[Any] = [None, None]
                dist.all_gather_object(known, reg.state_dict()["strength"])
                assert known[0] == known[1]
            assert 1 / 3 < float(reg.metrics["relative_distance"]) / 1e-2 < 3


def check_one_backward() -> None:
    """With a fixed lam; the weights' gradients are not known within a step."""
    for name in ("lora", "steering"):
        compare(TINY, name, strategy="one-backward", micro=2)
    model = shard(TINY.make())
    with (
        regularizer(model, "weights", strategy="one-backward") as reg,
        pytest.raises(ValueError, match=says("FSDP2", "auxiliary='lora' or 'steering'")),
    ):
        reg(model, TINY.batch(), TINY.loss)


def check_training() -> None:
    for options in ({}, KEEP):
        for name in ("lora", "steering"):
            for strategy in ("auto", "retained"):
                compare(TINY, name, shard(TINY.make(), **options), clip=0.5, sharded_only={"strategy": strategy})


def check_accumulation() -> None:
    """With gradient synchronisation off between optimizer steps, on always, and plain steps in between (every=2)."""
    for options in (KEEP, {}):
        compare(TINY, "steering", shard(TINY.make(), **options), micro=2)
        compare(TINY, "steering", shard(TINY.make(), **options), micro=2, sharded_only={"synchronise_always": True})
    for every in (2, 3):
        compare(TINY, "steering", steps=3, micro=3, every=every)


def check_accumulation_in_another_dtype() -> None:
    """FSDP keeps unreduced gradients of another dtype elsewhere; a plain step's are not lost."""
    policy = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float64)
    model = shard(TINY.make(), mp_policy=policy)
    same: dict[str, Any] = {"steps": 2, "micro": 3, "every": 2, "optimizer": functools.partial(torch.optim.SGD, lr=0.1)}
    gradients, _ = train_sharded(TINY, "steering", model, **same)
    assert mismatch(gradients, train(TINY, "steering", **same)[0])[0] < 1e-4


def check_pending_gradients() -> None:
    """A plain step without synchronisation, then a step of the regularizer: the sum of both."""
    model: Any = LLAMA.make()
    shard(model)
    batches = [LLAMA.batch(10 + rank) for rank in range(2)]
    model.set_requires_gradient_sync(False)
    LLAMA.loss(model, batches[dist.get_rank()]).backward()
    model.set_requires_gradient_sync(True)
    with regularizer(model, "steering") as reg:
        reg(model, LLAMA.batch(dist.get_rank()), LLAMA.loss).backward()
    want = expected(LLAMA, "steering", [{}] * 2)
    for batch in batches:
        plain = LLAMA.make()
        LLAMA.loss(plain, batch).backward()
        want = {name: g + plain.get_parameter(name).grad / 2 for name, g in want.items()}
    assert_same_gradients(gradients_of(model), want)
    model.set_requires_gradient_sync(False)
    LLAMA.loss(model, batches[dist.get_rank()]).backward()
    with regularizer(model, "weights") as reg, pytest.raises(ValueError, match=says("gradient synchronisation on")):
        reg(model, LLAMA.batch(dist.get_rank()), LLAMA.loss)


def check_options() -> None:
    for name, options in [
        ("lora", {"ascent_steps": 2}),
        ("steering", {"batch_fraction": 0.5}),
        ("steering", {"distance": "logit_kl"}),
        ("steering", {"stop_gradient": "none"}),
        ("lora", {"layers": ["blocks.1"]}),
        ("steering", {"layers": ["blocks.0.down", "blocks.1.down"]}),
    ]:
        compare(TINY, name, steps=1, **options)
    compare(TINY, "lora", steps=1, extra={"undesirable": TINY.batch(77)})


def check_weights_in_several_steps() -> None:
    """The shards are moved twice, along averaged gradients, and are back to the last bit."""
    for options in ({}, KEEP):
        model = shard(TINY.make(), **options)
        model.set_reshard_after_backward(not options)
        before = [p.detach().to_local().clone() for p in model.parameters()]
        reg = regularizer(model, "weights", ascent_steps=2)
        reg(model, TINY.batch(dist.get_rank()), TINY.loss).backward()
        assert_same_gradients(gradients_of(model), expected(TINY, "weights", [{}] * 2, shared=True, ascent_steps=2))
        model.reshard()
        after = [p.detach().to_local() for p in model.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        norm = torch.stack([delta.full_tensor().norm() for delta in reg.perturbation.values()]).norm()
        assert 0 < float(norm) <= 0.1 + 1e-9


def check_checkpointing() -> None:
    for case in (LLAMA, PEFT):
        for name in ("lora", "steering", *(("weights",) if case is PEFT else ())):
            model: Any = case.make()
            if case is PEFT:
                model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            shard(model)
            if name == "weights":
                batch = case.batch(dist.get_rank())
                regularizer(model, name)(model, batch, case.loss).backward()
                assert_same_gradients(gradients_of(model), expected(case, name, [{}] * 2, shared=True))
            else:
                compare(case, name, model, steps=1)


def check_mixed_precision() -> None:
    """bfloat16 compute, float32 shards: near the gradients in float32, and no farther than a retained graph is."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    want = train(TINY, "lora", steps=1, make=lambda: TINY.make().float(), batch_of=lambda r, n: TINY.batch(r))[0]
    errors = {}
    for strategy in ("auto", "retained"):
        model = shard(TINY.make().float(), mp_policy=policy)
        reg = regularizer(model, "lora", strategy=strategy)
        reg(model, TINY.batch(dist.get_rank()), TINY.loss).backward()
        got = gradients_of(model)
        assert all(g is not None and g.dtype == torch.float32 for g in got.values())
        errors[strategy] = mismatch(got, want)[0]
    assert errors["auto"] < max(0.1, 1.5 * errors["retained"]), errors


def check_autocast_around_the_step() -> None:
    """Autocast keeps what it casts for as long as it is in force: pass 2 is not to run on casts of pass 1's weights."""
    found = []
    for whole_or_sharded in (lambda model: model, shard):
        model = whole_or_sharded(TINY.make().float())
        reg = regularizer(model, "weights", alpha=0.3, lam=1.0)
        with torch.autocast("cpu", torch.bfloat16):
            loss = reg(model, TINY.batch(), TINY.loss)
        loss.backward()
        found.append(float(reg.metrics["consistency_loss"]))
    assert found[1] == pytest.approx(found[0], rel=0.05)


def check_cpu_offload() -> None:
    compare(TINY, "lora", shard(TINY.make(), offload_policy=CPUOffloadPolicy(pin_memory=False)))


def check_hybrid_sharding() -> None:
    for shape in ((1, 2), (2, 1)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        compare(TINY, "steering", shard(TINY.make(), mesh=mesh))
        model = shard(TINY.make(), mesh=mesh)
        reg = regularizer(model, "lora", seed=3 + dist.get_rank(), sync_perturbation=True)
        reg(model, TINY.batch(dist.get_rank()), TINY.loss).backward()
        assert_same_gradients(gradients_of(model), expected(TINY, "lora", [a_matrices_of(reg)] * 2, shared=True))


class Projected(nn.Module):
    """A body with a map before the blocks, whose weight the backward needs, inside of a root with a head."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Body()
        self.head = nn.Linear(8, 13)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.inner(input_ids))


class Body(TinyLM):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 8)
        del self.head

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.body(self.project(self.embed(input_ids)))


def check_which_modules_are_sharded() -> None:
    """Only the root; the body as well, freed after its forward; pairs of blocks; maps inside of the blocks."""
    projected = Case(
        "projected", lambda: seeded(Projected), token_batch, TINY.loss, TINY.mask,
        tuple(f"inner.blocks.{i}" for i in range(3)), 6,
    )  # fmt: skip

    def nested(model: Any) -> Any:
        for block in model.inner.blocks:
            fully_shard(block)
        fully_shard(model.inner, reshard_after_forward=True)
        return fully_shard(model, reshard_after_forward=True)

    def only_body(model: Any) -> Any:
        fully_shard(model.inner, reshard_after_forward=True)
        return fully_shard(model)

    def pair(model: Any) -> Any:
        fully_shard([model.blocks[0], model.blocks[1]])
        return fully_shard(model)

    def maps(model: Any) -> Any:
        for block in model.blocks:
            fully_shard(block.up)
            fully_shard(block)
        return fully_shard(model)

    for name in ("steering", "lora"):
        compare(projected, name, nested(projected.make()))
        compare(projected, name, only_body(projected.make()))
        for sharding in (fully_shard, pair, maps):
            compare(TINY, name, sharding(TINY.make()))


def check_attached_to_a_part() -> None:
    """The regularizer may sit on a module inside of the root: its replay has to start at the root all the same."""
    model: Any = shard(LLAMA.make())
    plain: Any = LLAMA.make()
    batches = [LLAMA.batch(rank) for rank in range(2)]
    with regularizer(model.model, "steering") as reg:
        reg(model, batches[dist.get_rank()], LLAMA.loss).backward()
    gradients = []
    for batch in batches:
        plain.zero_grad()
        with regularizer(plain.model, "steering") as reg:
            reg(plain, batch, LLAMA.loss).backward()
        gradients.append({n: p.grad.clone() for n, p in plain.named_parameters()})
    want = {n: (gradients[0][n] + gradients[1][n]) / 2 for n in gradients[0]}
    assert_same_gradients(gradients_of(model), want)


def check_leaves_outside_of_the_shards() -> None:
    """A soft prompt beside the model gets its gradient, and a separate head, too."""
    prompt = torch.full((13,), 0.1, dtype=torch.float64, requires_grad=True)
    prompt.grad = torch.ones_like(prompt)
    model, plain = shard(TINY.make()), TINY.make()

    def loss(given: Any, batch: Batch) -> Tensor:
        return next_token_loss(given(batch["input_ids"]) + prompt, batch["labels"])

    batch = TINY.batch(dist.get_rank())
    regularizer(model, "steering")(model, batch, loss).backward()
    got = prompt.grad.clone()
    prompt.grad = torch.ones_like(prompt)
    regularizer(plain, "steering")(plain, batch, loss).backward()
    assert torch.allclose(got, prompt.grad, rtol=1e-9, atol=1e-14)
    assert float((got - 1).norm()) > 1e-3


def check_gradients_are_not_touched_before_the_backward() -> None:
    model = shard(TINY.make())
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    before = [(parameter.grad, parameter.grad.to_local().clone()) for parameter in model.parameters()]
    calls: list[Tensor] = []
    first = next(model.parameters())
    first.register_post_accumulate_grad_hook(calls.append)
    reg = regularizer(model, "lora")
    loss = reg(model, TINY.batch(dist.get_rank()), TINY.loss)
    for parameter, (gradient, value) in zip(model.parameters(), before, strict=True):
        assert parameter.grad is gradient
        assert torch.equal(gradient.to_local(), value)
    assert not calls
    loss.backward()
    assert len(calls) == 1
    assert not any("lfu" in name for name in model.state_dict())


def check_exceptions_leave_gradients_and_weights() -> None:
    """In the loss, in the backward of pass 1, in pass 2, and in the backward of pass 2, on both ranks."""
    forwards: list[int] = []

    class Fragile(TinyLM):
        where = ""

        def body(self, hidden: Tensor) -> Tensor:
            forwards.append(1)
            if self.where == f"backward {len(forwards)}":
                hidden = FailingBackward.apply(hidden)
            if self.where == f"forward {len(forwards)}":
                raise KeyError("forward")
            return super().body(hidden)

    batch = TINY.batch(dist.get_rank())
    want = expected(TINY, "steering", [{}] * 2)
    for name in ("steering", "weights"):
        for where in ("forward 1", "backward 1", "forward 2", "backward 2"):
            model: Any = shard(seeded(Fragile))
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, 0.5)
            before = [(p, p.grad, p.grad.to_local().clone(), p.to_local().clone()) for p in model.parameters()]
            reg = regularizer(model, name)
            model.where = where
            forwards.clear()
            with pytest.raises(KeyError):
                reg(model, batch, TINY.loss)
            model.where = ""
            for parameter, gradient, value, weight in before:
                assert parameter.grad is gradient, (name, where)
                assert torch.equal(gradient.to_local(), value)
                assert torch.equal(parameter.to_local(), weight)
            if hasattr(model, "reset_iter_state"):
                model.reset_iter_state()
                model.zero_grad()
                reg(model, batch, TINY.loss).backward()
                if name == "steering":
                    assert_same_gradients(gradients_of(model), want)


class _Tag(torch.autograd.Function):
    """Passes a tensor on; the node of the graph holds `tag`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tag: object) -> Tensor:
        ctx.tag = tag
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Tag:
    """Something that weak references can point to."""


def check_one_graph_at_a_time() -> None:
    """The graph of pass 1 is gone when pass 2 starts; a retained one is not."""
    for strategy, alive in (("auto", False), ("retained", True)):
        model = shard(TINY.make())
        tags: list[weakref.ref[Tag]] = []
        seen: list[bool] = []

        def watch(module: nn.Module, args: Any, output: Tensor, tags: Any = tags, seen: Any = seen) -> Tensor:
            seen.extend(tags[:1] and [tags[0]() is not None])
            tag = Tag()
            tags.append(weakref.ref(tag))
            return _Tag.apply(output, tag)

        model.blocks[0].up.register_forward_hook(watch)
        reg = regularizer(model, "steering", strategy=strategy)
        loss = reg(model, TINY.batch(dist.get_rank()), TINY.loss)
        assert seen == [alive], (strategy, seen)  # in pass 2
        loss.backward()


def sum_loss(given: Any, batch: Batch) -> Tensor:
    logits, labels = given(batch["input_ids"]), batch["labels"]
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / 20


def check_a_rank_without_tokens() -> None:
    """Both ranks run the same forwards and collectives, whatever their labels."""

    def batch_of(rank: int, number: int) -> Batch:
        batch = token_batch(10 * number + rank)
        return {**batch, "labels": torch.full_like(batch["labels"], -100)} if rank == 1 else batch

    case = Case("sum", TINY.make, token_batch, sum_loss, TINY.mask, TINY.layers, 6)
    for name, options in [
        ("lora", {"ascent_steps": 2}),
        ("steering", {"batch_fraction": 0.5, "every": 2}),
        ("steering", {"strategy": "retained"}),
        ("steering", {"layers": ["blocks.0"]}),
    ]:
        model = shard(TINY.make())
        calls: list[int] = []
        handle = model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        with pytest.warns(LfUWarning) if dist.get_rank() == 1 else nullcontext(), Collectives() as collectives:
            got = train_sharded(case, name, model, batch_of=batch_of, optimizer=ADAMW, **options)
        handle.remove()
        with pytest.warns(LfUWarning):
            want = train(case, name, steps=2, batch_of=batch_of, optimizer=ADAMW, **options)
        assert_same_gradients(got[0], want[0])
        assert same_on_all_ranks(len(calls))
        assert same_on_all_ranks(collectives.counts.total())
        assert collectives.counts.total() > 20


def check_a_rank_that_does_not_repeat() -> None:
    """Rank 1's forward does not repeat itself; both ranks go through as many forwards and backwards."""
    calls: list[int] = []

    class Restless(TinyLM):
        def forward(self, input_ids: Tensor) -> Tensor:
            calls.append(1)
            noise = 1e-2 * len(calls) * dist.get_rank()
            return self.head(self.body(self.embed(input_ids) + noise))

    model: Any = shard(seeded(Restless))
    reg = regularizer(model, "steering")
    for step in range(3):
        warned = step == 0 and dist.get_rank() == 1
        with pytest.warns(LfUWarning, match="This step is plain SFT") if warned else nullcontext():
            reg(model, TINY.batch(dist.get_rank()), TINY.loss).backward()
        assert len(calls) == 2 * (step + 1)


def check_forwards_run_to_their_end() -> None:
    """Also where only the first block is asked for: FSDP keeps track of the end of the root's forward."""
    model = shard(TINY.make())
    started: list[int] = []
    ended: list[int] = []
    model.register_forward_pre_hook(lambda *_: started.append(1))
    model.register_forward_hook(lambda *_: ended.append(1))
    with regularizer(model, "steering", layers=["blocks.0"]) as reg:
        for _ in range(2):
            reg(model, TINY.batch(dist.get_rank()), TINY.loss).backward()
    assert len(started) == len(ended) == 4  # two steps of two passes


def check_weights_with_a_retained_graph_are_refused() -> None:
    model = shard(TINY.make())
    for options in ({"strategy": "retained"}, {"stop_gradient": "none"}):
        with (
            regularizer(model, "weights", **options) as reg,
            pytest.raises(ValueError, match=says("WeightDeltas", "FSDP2", "stop_gradient='clean'", "lora")),
        ):
            reg(model, TINY.batch(), TINY.loss)


COUNTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "steering": {"name": "steering"},
    "lora": {"name": "lora"},
    "weights": {"name": "weights"},
    "steering, ascent_steps=2": {"name": "steering", "ascent_steps": 2},
    "steering, sync_perturbation": {"name": "steering", "sync_perturbation": True},
    "steering, retained": {"name": "steering", "strategy": "retained"},
}


def step_collectives(options: Mapping[str, Any]) -> dict[str, int]:
    """Collectives of a step at which nothing is checked or measured, of a model with 3 blocks."""
    model = shard(TINY.make())
    batch = TINY.batch(dist.get_rank())
    step: Callable[[], Tensor]
    if options:
        reg = regularizer(model, **options)
        step = lambda: reg(model, batch, TINY.loss)  # noqa: E731
    else:
        step = lambda: TINY.loss(model, batch)  # noqa: E731
    step().backward()
    if options:
        reg._progress.step, reg._progress.strength.seen = 11, FIRST_STEPS
    with Collectives() as collectives:
        step().backward()
    return dict(collectives.counts)


def check_collectives() -> None:
    """The table of docs/distributed.md: for a model of 3 blocks and a root, as many as it says."""
    from tests.distributed.table import FSDP2

    for label, options in COUNTS.items():
        got = step_collectives(options)
        want = dict(zip(("all-gather", "reduce-scatter", "all-reduce"), FSDP2[label], strict=True))
        assert {name: got.get(name, 0) for name in want} == want, (label, got)
        assert set(got) <= set(want)


def check_measuring_costs_four_collectives() -> None:
    """However many parameters there are: two norms, a product, and what ranks have measured."""
    model = shard(TINY.make())
    reg = regularizer(model, "steering")
    batch = TINY.batch(dist.get_rank())
    counts = []
    for step in (1, 11):
        reg(model, batch, TINY.loss).backward()
        reg._progress.step, reg._progress.strength.seen = step, 0 if step == 1 else FIRST_STEPS
        with Collectives() as collectives:
            reg(model, batch, TINY.loss).backward()
        counts.append(collectives.counts["all-reduce"])
    assert counts[0] - counts[1] == 4


def check_no_regularizer_no_difference() -> None:
    """After `remove()` the sharded model trains as it did before."""
    model, twin = shard(TINY.make()), shard(TINY.make())
    batch = TINY.batch(dist.get_rank())
    with LfURegularizer(model, "steering") as reg:
        reg(model, batch, TINY.loss).backward()
    model.zero_grad()
    for m in (model, twin):
        TINY.loss(m, batch).backward()
    for (name, p), (_, q) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.equal(whole(p.grad), whole(q.grad)), name
    assert len(blocks_of(model)) == 3


def check_recipe() -> None:
    run_example("fsdp2.py")
