"""DistributedDataParallel on two processes."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from lfu_reg import LfURegularizer, LfUWarning
from tests.distributed.examples import run_example
from tests.distributed.reference import both_terms, expected, length, mean, parameters_of, regularizer, train
from tests.support.cases import Batch, Case, seeded, token_batch
from tests.support.compare import assert_same_gradients, gradients_of, mismatch
from tests.support.harness import a_matrices_of
from tests.support.models import LLAMA, PEFT, TINY
from tests.support.plain_models import TinyLM
from tests.support.refusals import says
from tests.support.snapshots import Snapshot

SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "find_unused": {"find_unused_parameters": True},
    "bucket_view": {"gradient_as_bucket_view": True},
}


def count_reductions(ddp: DDP) -> list[int]:
    """Sizes of the buckets that are reduced from now on."""
    sizes: list[int] = []

    def hook(state, bucket):  # DDP would compare annotations
        sizes.append(bucket.buffer().numel())
        flat = bucket.buffer().div_(dist.get_world_size())
        work = dist.all_reduce(flat, async_op=True)
        assert work is not None
        return work.get_future().then(lambda future: future.value()[0])

    ddp.register_comm_hook(None, hook)
    return sizes


def train_ddp(
    case: Case,
    name: str,
    kind: str = "default",
    *,
    steps: int = 3,
    micro: int = 1,
    model: nn.Module | None = None,
    attach_to_wrapper: bool = False,
    batch_of: Any = None,
    extra: Mapping[str, Any] | None = None,
    **options: Any,
) -> tuple[dict[str, Tensor | None], dict[str, Tensor], list[int]]:
    """As `reference.train`, on this rank's batches; returns the sizes of the reduced buckets, too."""
    rank = dist.get_rank()
    batch_of = batch_of or (lambda rank, number: case.batch(10 * number + rank))
    model = case.make() if model is None else model
    ddp = DDP(model, **KINDS[kind])
    sizes = count_reductions(ddp)
    optimizer = SGD(ddp.parameters())
    gradients: dict[str, Tensor | None] = {}
    with regularizer(ddp if attach_to_wrapper else model, name, **options) as reg:
        for step in range(steps):
            optimizer.zero_grad()
            for number in range(step * micro, (step + 1) * micro):
                last = number == (step + 1) * micro - 1
                with nullcontext() if last else ddp.no_sync():
                    (reg(ddp, batch_of(rank, number), case.loss, **(extra or {})) / micro).backward()
            gradients = {n: None if g is None else g.clone() for n, g in gradients_of(model).items()}
            optimizer.step()
    return gradients, parameters_of(model), sizes


_REFERENCES: dict[str, Any] = {}


def compare(
    case: Case, name: str, kind: str = "default", *, wrapper: Mapping[str, Any] | None = None, **same: Any
) -> None:
    gradients, parameters, sizes = train_ddp(case, name, kind, **(wrapper or {}), **same)
    key = repr((case.name, name, sorted(same.items())))
    if key not in _REFERENCES:
        _REFERENCES[key] = train(case, name, optimizer=SGD, **same)
    want_gradients, want_parameters = _REFERENCES[key]
    assert_same_gradients(gradients, want_gradients)
    assert_same_gradients(parameters, want_parameters)
    trained = sum(g.numel() for g in gradients.values() if g is not None)
    assert sum(sizes) == trained * same.get("steps", 3), "every gradient is reduced exactly once a step"


def check_against_the_oracle() -> None:
    for name in ("lora", "steering", "weights"):
        model = TINY.make()
        ddp = DDP(model)
        reg = regularizer(model, name)
        reg(ddp, TINY.batch(dist.get_rank()), TINY.loss).backward()
        a_matrices = [a_matrices_of(reg)] * 2  # the seed is the same on both ranks
        assert_same_gradients(gradients_of(model), expected(TINY, name, a_matrices))


def check_settings_of_the_wrapper() -> None:
    for kind in KINDS:
        for name in ("lora", "steering", "weights"):
            compare(TINY, name, kind, steps=2, wrapper={"attach_to_wrapper": kind == "find_unused"})


def check_accumulation() -> None:
    for kind in KINDS:
        compare(TINY, "lora", kind, micro=2, steps=2)


def check_options() -> None:
    for name, options in [
        ("lora", {"ascent_steps": 2}),
        ("weights", {"ascent_steps": 2}),
        ("steering", {"batch_fraction": 0.5}),
        ("lora", {"every": 2}),
        ("steering", {"distance": "logit_kl"}),
        ("steering", {"stop_gradient": "none"}),
        ("steering", {"strategy": "retained"}),
    ]:
        compare(TINY, name, steps=2, **options)
    compare(TINY, "lora", steps=2, extra={"undesirable": TINY.batch(77)})


def check_transformers_peft_and_checkpointing() -> None:
    def checkpointed() -> nn.Module:
        model: Any = PEFT.make()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model

    for name in ("lora", "steering", "weights"):
        compare(PEFT, name, steps=2, wrapper={"model": checkpointed()})
    compare(LLAMA, "steering", "find_unused", steps=2)


def check_reentrant_checkpointing_is_refused() -> None:
    model: Any = LLAMA.make()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with regularizer(model, "steering") as reg, pytest.raises(RuntimeError, match=says("use_reentrant=False")):
        reg(DDP(model), LLAMA.batch(), LLAMA.loss)


def check_static_graph_is_refused() -> None:
    for options in ({}, {"strategy": "retained"}):
        model = TINY.make()
        before = Snapshot.of(model)
        ddp = DDP(model, static_graph=True)
        with (
            regularizer(model, "steering", **options) as reg,
            pytest.raises(ValueError, match=says("static_graph=False", "use_reentrant=False")),
        ):
            reg(ddp, TINY.batch(dist.get_rank()), TINY.loss)
        before.check(model)


def check_the_unwrapped_module_is_refused() -> None:
    batch = TINY.batch(dist.get_rank())
    for seen in (True, False):
        model = TINY.make()
        ddp = DDP(model)
        before = Snapshot.of(model)
        with regularizer(model, "steering") as reg:
            if seen:
                reg(ddp, batch, TINY.loss).backward()
                model.zero_grad()
            with pytest.raises(ValueError, match=says("ddp.module", "reg(ddp, batch, sft_loss_fn)", "no_sync")):
                reg(model, batch, TINY.loss)
            with pytest.raises(ValueError, match=says("ddp.module")):
                reg(ddp, batch, lambda given, b: TINY.loss(given.module, b))
            # Without synchronisation there is nothing to miss, and a loss function may know the wrapper by itself.
            with ddp.no_sync():
                reg(model, batch, TINY.loss)
            reg(model, batch, lambda given, b, ddp=ddp: TINY.loss(ddp, b)).backward()
        want, _ = train(TINY, "steering", steps=1, batch_of=lambda rank, number: TINY.batch(rank))
        assert_same_gradients(gradients_of(model), want)
        model.zero_grad()
        before.check(model)
        del ddp


def check_every_rank_has_its_own_perturbation() -> None:
    for shared in (False, True):
        for name in ("lora", "steering", "weights", "random"):
            torch.manual_seed(100 + dist.get_rank())  # the default seed differs between ranks
            model = TINY.make()
            ddp = DDP(model)
            reg = regularizer(model, name, seed=None, sync_perturbation=shared)
            reg(ddp, TINY.batch(dist.get_rank()), TINY.loss).backward()
            flat = torch.cat(
                [t.flatten() for v in reg.perturbation.values() for t in (v if isinstance(v, tuple) else [v])]
            )
            assert torch.equal(*gathered(flat)) == shared, name
            if not shared:
                assert reg.seed == 100 + dist.get_rank()
                continue
            assert reg.seed == 100
            if name != "random":
                want = expected(TINY, name, [a_matrices_of(reg)] * 2, shared=True)
                assert_same_gradients(gradients_of(model), want)


def check_shared_ascent_in_several_steps() -> None:
    """Every one of them is shared, so ranks stay together; a missing gradient counts as zero."""

    class Sidelined(TinyLM):
        """On rank 1 the blocks run, but do not reach the loss of the first step."""

        sidelined = dist.get_rank() == 1

        def body(self, hidden: Tensor) -> Tensor:
            result = super().body(hidden)
            return hidden if self.sidelined else result

    model: Any = seeded(Sidelined)
    with regularizer(model, "lora", ascent_steps=3, sync_perturbation=True) as reg:
        for number in range(2):
            reg(model, TINY.batch(10 * number + dist.get_rank()), TINY.loss).backward()
            flat = torch.cat([t.flatten() for pair in reg.perturbation.values() for t in pair])
            assert torch.equal(*gathered(flat))
            assert float(flat.norm()) > 0
            model.sidelined = False


def check_shared_ascent_over_a_given_group() -> None:
    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    model = TINY.make()
    ddp = DDP(model)
    reg = regularizer(model, "steering", sync_perturbation=True, process_group=alone)
    reg(ddp, TINY.batch(dist.get_rank()), TINY.loss).backward()
    want, _ = train(TINY, "steering", steps=1, batch_of=lambda rank, number: TINY.batch(rank))
    assert_same_gradients(gradients_of(model), want)


def check_shared_ascent_over_different_layers_is_refused() -> None:
    class Shallow(TinyLM):
        def body(self, hidden: Tensor) -> Tensor:
            for block in self.blocks[: 3 - dist.get_rank()]:
                hidden = block(hidden)
            return hidden

    model = seeded(Shallow)
    reg = regularizer(model, "steering", sync_perturbation=True)
    with pytest.raises(RuntimeError, match=says("same layers", "first rank", "sync_perturbation=False")):
        reg(DDP(model, find_unused_parameters=True), TINY.batch(), TINY.loss)


def check_a_rank_without_tokens() -> None:
    def loss(given: Any, batch: Batch) -> Tensor:
        logits, labels = given(batch["input_ids"]), batch["labels"]
        total = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        return total / 20

    def batch_of(rank: int, number: int) -> Batch:
        batch = token_batch(10 * number + rank)
        return {**batch, "labels": torch.full_like(batch["labels"], -100)} if rank == 1 else batch

    case = Case("sum", TINY.make, token_batch, loss, TINY.mask, TINY.layers, 6)
    for name, options in [
        ("lora", {"ascent_steps": 2}),
        ("steering", {"batch_fraction": 0.5}),
        ("weights", {}),
    ]:
        with pytest.warns(LfUWarning) if dist.get_rank() == 1 else nullcontext():
            got = train_ddp(case, name, steps=2, batch_of=batch_of, **options)
        with pytest.warns(LfUWarning):
            want = train(case, name, steps=2, batch_of=batch_of, optimizer=SGD, **options)
        assert_same_gradients(got[0], want[0])
        assert_same_gradients(got[1], want[1])


def check_a_rank_that_does_not_repeat() -> None:
    """Where a forward communicates (buffers are broadcast), its ranks run as many forwards, and it adds plain SFT."""
    calls: list[int] = []

    class Restless(TinyLM):
        """Its forward does not repeat itself on rank 1."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.ones(()))

        def forward(self, input_ids: Tensor) -> Tensor:
            calls.append(1)
            noise = 1e-2 * len(calls) * dist.get_rank()
            return self.head(self.body(self.embed(input_ids) * self.scale + noise))

    model = seeded(Restless)
    ddp = DDP(model)
    reg = regularizer(model, "steering", layers=["blocks.0", "blocks.1"])
    for step in range(3):
        warned = step == 0 and dist.get_rank() == 1
        with pytest.warns(LfUWarning, match="This step is plain SFT") if warned else nullcontext():
            reg(ddp, TINY.batch(dist.get_rank()), TINY.loss).backward()
        counts = [torch.zeros((), dtype=torch.long) for _ in range(2)]
        dist.all_gather(counts, torch.tensor(len(calls)))
        assert counts[0] == counts[1] == 2 * (step + 1)
        assert torch.equal(*gathered(model.embed.weight.grad))
    assert ("ascent_grad_norm" in reg.metrics) == (dist.get_rank() == 0)


def gathered(tensor: Tensor | None) -> list[Tensor]:
    assert tensor is not None
    both = [torch.empty_like(tensor) for _ in range(2)]
    dist.all_gather(both, tensor)
    return both


def check_batch_norm_buffers() -> None:
    """Buffers are broadcast in the forward; pass 2 leaves them as pass 1 did."""
    model, twin = (seeded(lambda: TinyLM(batch_norm=True)) for _ in range(2))
    ddp, plain = DDP(model), DDP(twin)
    with regularizer(model, "steering") as reg:
        for number in range(2):
            batch = TINY.batch(10 * number + dist.get_rank())
            reg(ddp, batch, TINY.loss).backward()
            TINY.loss(plain, batch).backward()
            for (name, buffer), (_, want) in zip(model.named_buffers(), twin.named_buffers(), strict=True):
                assert torch.equal(buffer, want), name


def check_pass_2_communicates_nothing() -> None:
    """Ranks may differ in whether they run it."""
    model = seeded(lambda: TinyLM(batch_norm=True))
    ddp, calls = DDP(model), []
    broadcast = ddp._sync_buffers
    ddp._sync_buffers = lambda: (calls.append(1), broadcast())  # type: ignore[method-assign]
    with regularizer(model, "steering") as reg:
        for number in range(2):
            reg(ddp, TINY.batch(10 * number + dist.get_rank()), TINY.loss).backward()
            assert len(calls) == number + 1
            assert "ascent_grad_norm" in reg.metrics


class Branching(TinyLM):
    """Which of two weights takes part depends on the length of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList([torch.ones(8), torch.ones(8)])

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.body(self.embed(input_ids)) * self.scales[input_ids.shape[1] % 2])


def check_other_data_that_takes_another_branch() -> None:
    """DDP looks for unused parameters at the end of a forward; the one that counts is that of the batch itself."""
    case = replace(TINY, make=lambda: seeded(Branching))
    same: dict[str, Any] = {"steps": 2, "extra": {"undesirable": TINY.batch(77, shape=(3, 6))}}
    gradients, _, _ = train_ddp(case, "steering", "find_unused", **same)
    want, _ = train(case, "steering", optimizer=SGD, **same)
    assert gradients["scales.1"] is not None
    assert_same_gradients(gradients, want)


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return x + weight.sum() * 0

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def check_a_parameter_whose_gradient_is_none() -> None:
    """It is part of the graph, so DDP waits for it, also when nothing arrives there."""

    class Odd(TinyLM):
        def __init__(self) -> None:
            super().__init__()
            self.odd = nn.Parameter(torch.ones(3))

        def forward(self, input_ids: Tensor) -> Tensor:
            return super().forward(input_ids) + _NoGradient.apply(torch.zeros((), dtype=torch.float64), self.odd)

    model = seeded(Odd)
    ddp = DDP(model)
    with regularizer(model, "steering") as reg:
        for number in range(3):
            reg(ddp, TINY.batch(10 * number + dist.get_rank()), TINY.loss).backward()
            assert torch.equal(*gathered(model.embed.weight.grad))


def check_an_exception_leaves_everything() -> None:
    model = TINY.make()
    ddp = DDP(model)
    batch = TINY.batch(dist.get_rank())

    def fails(given: Any, b: Batch) -> Tensor:
        TINY.loss(given, b)
        raise KeyError("the user's")

    with regularizer(model, "lora") as reg:
        reg(ddp, batch, TINY.loss).backward()
        before = Snapshot.of(model)
        with pytest.raises(KeyError):
            reg(ddp, batch, fails)
        before.check(model)
        model.zero_grad()
        reg(ddp, batch, TINY.loss).backward()
        assert torch.equal(*gathered(model.embed.weight.grad))


def check_mean_of_gradients_differs_from_local_ones() -> None:
    """The comparison can fail: a rank's own gradients are not the average."""
    model = TINY.make()
    regularizer(model, "steering")(model, TINY.batch(dist.get_rank()), TINY.loss).backward()
    local = gradients_of(model)
    both = {name: gathered(g) for name, g in local.items()}
    average = mean([{name: pair[rank] for name, pair in both.items()} for rank in range(2)])
    assert mismatch(local, average)[0] > 1e-3


def check_all_of_it_needs_no_group() -> None:
    """A regularizer in a process group without any engine neither communicates nor complains."""
    model = TINY.make()
    reg = LfURegularizer(model, "steering")
    if dist.get_rank() == 0:
        reg(model, TINY.batch(), TINY.loss).backward()


STRENGTH: dict[str, Any] = {"lam": None, "strength": 0.8}


def check_strength() -> None:
    """One lam for all ranks, from the lengths of all ranks' gradients."""
    for name in ("lora", "steering", "weights"):
        model = TINY.make()
        ddp = DDP(model)
        with regularizer(model, name, **STRENGTH) as reg:
            reg(ddp, TINY.batch(dist.get_rank()), TINY.loss).backward()
            sft, cons = both_terms(TINY, name, [a_matrices_of(reg)] * 2)
            squares = [sum(length(g) ** 2 for g in term) for term in (sft, cons)]
            lam = 0.8 * (squares[0] / squares[1]) ** 0.5
            assert float(reg.metrics["lam"]) == pytest.approx(lam, rel=1e-9)
            assert float(reg.metrics["gradient_ratio"]) == pytest.approx(0.8, rel=1e-6)
        want = {n: g + lam * mean(cons)[n] for n, g in mean(sft).items()}  # type: ignore[operator]
        assert_same_gradients(gradients_of(model), want)


def known_on_all_ranks(reg: LfURegularizer) -> dict[str, float]:
    """What alpha and lam follow from: the same everywhere."""
    state = reg.state_dict()["strength"]
    states: list[Any] = [None] * 2
    dist.all_gather_object(states, state)
    assert states[0] == states[1]
    return state


def check_alpha_is_the_same_on_all_ranks() -> None:
    """Also where ranks have looked for it one by one."""
    for name in ("lora", "steering", "weights"):
        model = TINY.make()
        ddp = DDP(model)
        with regularizer(model, name, alpha=None, **STRENGTH) as reg:
            for number in range(4):
                reg(ddp, TINY.batch(10 * number + dist.get_rank()), TINY.loss).backward()
                assert known_on_all_ranks(reg)["alpha"] > 0


def check_strength_where_a_rank_is_plain() -> None:
    """Its loss does not repeat for a while: no rank waits for it, and all of them know the same."""
    for layers in ("all", "late"):
        model, calls = TINY.make(), [0]

        def loss(given: Any, batch: Batch, calls: list[int] = calls) -> Tensor:
            calls[0] += 1
            restless = dist.get_rank() == 1 and calls[0] < 12
            ids = batch["input_ids"].roll(calls[0], 1) if restless else batch["input_ids"]
            return TINY.loss(given, {**batch, "input_ids": ids})

        ddp = DDP(model)
        with regularizer(model, "steering", alpha=None, layers=layers, **STRENGTH) as reg:
            for number in range(16):
                warned = number == 0 and dist.get_rank() == 1
                with pytest.warns(LfUWarning, match="plain SFT") if warned else nullcontext():
                    reg(ddp, TINY.batch(10 * number + dist.get_rank()), loss).backward()
                known_on_all_ranks(reg)
                assert torch.equal(*gathered(model.embed.weight.grad))
            assert "consistency_loss" in reg.metrics
            assert torch.equal(*gathered(reg.metrics["lam"]))


def check_strength_where_a_rank_runs_out_of_batches() -> None:
    """Under `join` each rank goes by its own gradients."""
    model = TINY.make()
    ddp = DDP(model)
    with regularizer(model, "steering", **STRENGTH) as reg, ddp.join():
        for number in range(2 + 2 * dist.get_rank()):
            reg(ddp, TINY.batch(10 * number + dist.get_rank()), TINY.loss).backward()
            assert float(reg.metrics["gradient_ratio"]) == pytest.approx(0.8, rel=1e-6)


def check_one_backward() -> None:
    """An ordinary backward, in which DDP reduces; each rank ascends along its own direction."""
    for name in ("lora", "steering", "weights"):
        compare(TINY, name, strategy="one-backward")
        compare(TINY, name, "bucket_view", steps=2, micro=2, strategy="one-backward")


def check_recipe() -> None:
    run_example("ddp.py")
