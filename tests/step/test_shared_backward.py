"""What no perturbation reaches runs once, forward and backward, and the gradients are those of the paper's step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lfu_reg import LfURegularizer, RandomDirections, SteeringVectors
from lfu_reg.hooks.taps import Gate, tap
from lfu_reg.model import checkpoints
from lfu_reg.step.shared_backward import SharedBackward, shared_backward
from lfu_reg.step.strength import FIRST_STEPS
from tests.support.cases import Batch, Case, next_token_loss, seeded
from tests.support.checkpointed import CheckpointedLM, GroupedLM, PlainLM
from tests.support.compare import assert_same_gradients, gradients_of
from tests.support.harness import auxiliary, run_pair
from tests.support.models import BERT, FROZEN, GEMMA, LLAMA, MIXTRAL, PEFT, TIED, TINY, VIT
from tests.support.plain_models import FailingBackward, ResidualBlock

# Layers, and for each auxiliary how often each of Llama's four blocks runs in a step.
RUNS = {
    "all": {"steering": [1, 2, 2, 2], "lora": [2, 2, 2, 2]},
    "early": {"steering": [1, 2], "lora": [2, 2]},
    "middle": {"steering": [1, 1, 1], "lora": [1, 1, 2]},
    "late": {"steering": [1, 1, 1, 1], "lora": [1, 1, 1, 2]},
    "two": {"steering": [1, 1, 2], "lora": [1, 2, 2]},
    "inner": {"steering": [1, 1, 2, 2], "lora": [1, 1, 2, 2]},
}
LAYERS: dict[str, Any] = {"two": [1, 2], "inner": r".*\.[23]\.mlp"}
ALPHA = 0.005
# One forward, and what its backward repeats: a region is repeated for what is above the cut, and for what is below.
RUNS_CHECKPOINTED = {CheckpointedLM: 2, GroupedLM: 3}
SHARES = checkpoints.can_tell_who_saves()
shares = pytest.mark.skipif(not SHARES, reason="this torch does not tell what is around a layer: nothing is shared")


@contextmanager
def runs(model: nn.Module, kind: type | tuple[type, ...]) -> Iterator[Counter[str]]:
    """How often the forward methods of modules of a kind run in the block, by name."""
    counts: Counter[str] = Counter()
    counted = {name: module for name, module in model.named_modules() if isinstance(module, kind)}
    for name, module in counted.items():

        def forward(*args: Any, name: str = name, own: Any = module.forward, **kwargs: Any) -> Any:
            counts.update([name])
            return own(*args, **kwargs)

        module.forward = forward  # type: ignore[method-assign]
    try:
        yield counts
    finally:
        for module in counted.values():
            del module.forward


def settled(model: nn.Module, case: Case, name: Any, **options: Any) -> LfURegularizer:
    """A regularizer that has learnt what the model writes to, at a step at which gradients are not compared."""
    reg = LfURegularizer(model, auxiliary(name) if isinstance(name, str) else name, alpha=ALPHA, lam=0.7, **options)
    reg(model, case.batch(), case.loss)
    reg.load_state_dict({**reg.state_dict(), "step": 11, "strength": {"seen": FIRST_STEPS}})
    return reg


def blocks_of(model: nn.Module, case: Case) -> list[nn.Module]:
    return [model.get_submodule(name) for name in case.layers]


def runs_of_first(model: nn.Module, case: Case, name: Any, loss: Any = None, **options: Any) -> int:
    """How often the second step runs the first block."""
    reg = settled(model, case, name, **options)
    first = model.get_submodule(case.layers[0])
    with runs(model, type(first)) as counts:
        reg(model, case.batch(), loss or case.loss)
    reg.remove()
    return counts[case.layers[0]]


def is_shared(model: nn.Module, case: Case, name: Any, loss: Any = None, **options: Any) -> bool:
    """Whether the second step runs the first block once only."""
    return runs_of_first(model, case, name, loss, **options) == 1


@shares
@pytest.mark.parametrize("case", [LLAMA, PEFT], ids=lambda c: c.name)
@pytest.mark.parametrize("name", ["steering", "lora"])
@pytest.mark.parametrize("left", [True, False], ids=["left early", "to its end"])
@pytest.mark.parametrize("layers", RUNS)
def test_blocks_below_the_first_perturbed_one_run_once(layers: str, left: bool, name: str, case: Case) -> None:
    """Where the loss function goes on after the model's call, it is run to its end, with the blocks that are left."""
    loss_function = (lambda model, batch: model(**batch).loss) if left else case.loss
    model = case.make()
    reg = settled(model, case, name, layers=LAYERS.get(layers, layers))
    with runs(model, type(blocks_of(model, case)[0])) as counts:
        loss = reg(model, case.batch(), loss_function)
    got = [counts[block] for block in case.layers]
    expected = RUNS[layers][name]
    assert got == expected + [1 if left else 2] * (4 - len(expected))
    loss.backward()


@shares
@pytest.mark.parametrize("name", ["steering", "lora"])
def test_their_backward_runs_once(name: str) -> None:
    model = LLAMA.make()
    reg = settled(model, LLAMA, name, layers="late")
    arrivals: Counter[str] = Counter()

    def watched(number: int, forward: Any) -> Any:
        def run(*args: Any) -> Tensor:
            output = forward(*args)
            output.grad_fn.register_hook(lambda *grads: arrivals.update([number]))  # a tensor's hook is a refusal
            return output

        return run

    for number, block in enumerate(model.model.layers):  # not by forward hooks, which would have to fire twice
        block.mlp.down_proj.forward = watched(number, block.mlp.down_proj.forward)
    reg(model, LLAMA.batch(), LLAMA.loss).backward()
    shared = 4 if name == "steering" else 3
    assert [arrivals[i] for i in range(4)] == [1] * shared + [2] * (4 - shared)


@pytest.mark.parametrize("case", [LLAMA, PEFT, FROZEN, MIXTRAL, BERT, VIT], ids=lambda c: c.name)
@pytest.mark.parametrize("name", ["steering", "lora"])
@pytest.mark.parametrize("layers", ["all", "middle", "late", "last"])
def test_gradients_are_the_oracles(layers: str, name: str, case: Case) -> None:
    chosen: Any = [len(case.layers) - 1] if layers == "last" else layers
    if case is FROZEN and layers == "middle":
        pytest.skip("nothing before this layer is trained")
    run_pair(case, name, reg_options={"layers": chosen}).check()
    model = case.make()
    if case is FROZEN:  # whose layers would fill a cache that no graph tells of
        assert model.config.use_cache
        model.config.use_cache = False
    if SHARES and (layers != "all" or name == "steering"):
        assert is_shared(model, case, name, layers=chosen)


@pytest.mark.parametrize(
    "options",
    [
        {"distance": "cosine"},
        {"reduction": "sum"},
        {"lam": 5.0, "alpha": 0.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["steering", "lora"])
def test_options(name: str, options: dict[str, Any]) -> None:
    run_pair(LLAMA, name, reg_options={"layers": "late"}, **options).check()


@shares
@pytest.mark.parametrize("name", ["steering", "lora"])
def test_layers_of_several_kinds(name: str) -> None:
    """Each kind has a mask of its own, which the model makes in both passes."""
    gradients = {}
    for strategy in ("released", "retained"):
        model = GEMMA.make()
        first = model.get_submodule(GEMMA.layers[0])
        options = {"alpha": ALPHA, "lam": 0.7, "layers": "late", "seed": 1, "strategy": strategy}
        with LfURegularizer(model, auxiliary(name), **options) as reg:
            shared = []
            for seed in range(4):
                model.zero_grad()
                with runs(model, type(first)) as counts:
                    reg(model, GEMMA.batch(seed), GEMMA.loss).backward()
                shared.append(counts[GEMMA.layers[0]] == 1)
        assert shared == [strategy == "released"] * 4
        gradients[strategy] = gradients_of(model)
    assert_same_gradients(gradients["released"], gradients["retained"])
    run_pair(GEMMA, name, reg_options={"layers": "late"}).check()


def test_further_ascent_steps() -> None:
    run_pair(LLAMA, "steering", reg_options={"layers": "late"}, ascent_steps=2).check()


@pytest.mark.parametrize("name", ["steering", "lora"])
def test_an_undesirable_batch(name: str) -> None:
    run_pair(LLAMA, name, reg_options={"layers": "late"}, undesirable=LLAMA.batch(7)).check()


@pytest.mark.parametrize("relative", [True, False])
def test_relative_steering(relative: bool) -> None:
    run_pair(LLAMA, "steering", reg_options={"layers": "late"}, aux_options={"relative": relative}).check()


@shares
def test_random_directions_share_as_well() -> None:
    assert is_shared(LLAMA.make(), LLAMA, RandomDirections(SteeringVectors()))


def test_samples_of_the_batch() -> None:
    """Half of the batch in pass 2: its gradient at the cut reaches only those rows, and the prefix all of them."""
    model, twin = LLAMA.make(), LLAMA.make()
    options: dict[str, Any] = {"batch_fraction": 0.5, "seed": 3, "alpha": 0.05, "lam": 0.7, "layers": "late"}
    with LfURegularizer(model, "steering", **options) as reg:
        reg(model, LLAMA.batch(), LLAMA.loss).backward()
    with LfURegularizer(twin, "steering", strategy="retained", **options) as reg:
        reg(twin, LLAMA.batch(), LLAMA.loss).backward()
    assert_same_gradients(gradients_of(model), gradients_of(twin))


@shares
def test_dropout_is_the_same_in_both_passes() -> None:
    """Masks drawn in the prefix are shared, and those behind it drawn again."""
    case = Case(
        "dropout", lambda: seeded(lambda: PlainLM(dropout=0.4)), TINY.batch, TINY.loss, TINY.mask, TINY.layers, 6
    )
    model = case.make()
    assert is_shared(model, case, "steering")
    for name in ("steering", "lora"):
        run_pair(case, name, reg_options={"layers": [1, 2]}, seed=5).check()


# ------------------------------------------------------------- where it must not be done


def lm_case(make: Any, layers: tuple[str, ...] = TINY.layers, loss: Any = TINY.loss) -> Case:
    return Case("lm", lambda: seeded(make), TINY.batch, loss, TINY.mask, layers, 6)


class SkipLM(PlainLM):
    """The embedding flows around the blocks to the head."""

    def body(self, hidden: Tensor) -> Tensor:
        return super().body(hidden) + hidden


class ShuffledLM(PlainLM):
    """Blocks run in another order than the one that they are kept in."""

    def body(self, hidden: Tensor) -> Tensor:
        for number in (0, 2, 1):
            hidden = self.blocks[number](hidden)
        return self.norm(hidden.flatten(0, 1)).view_as(hidden)


class InPlaceLM(PlainLM):
    """The loop writes into what a block returned."""

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        return block(hidden).mul_(1.1)


REFUSED = {
    "skip connection": lm_case(SkipLM),
    "another order": lm_case(ShuffledLM),
    "written in place": lm_case(InPlaceLM),
    "tied weights in training": lm_case(lambda: PlainLM(tied=True)),
    "tied Llama": TIED,
}


@pytest.mark.parametrize("reason", REFUSED)
@pytest.mark.parametrize("name", ["steering", "lora"])
def test_refused(name: str, reason: str) -> None:
    """LoRA acts inside of the first chosen layer: in another order, what is below has run before it all the same."""
    case = REFUSED[reason]
    shared = SHARES and reason == "another order" and name == "lora"
    assert is_shared(case.make(), case, name, layers=[1, 2]) == shared
    run_pair(case, name, reg_options={"layers": [1, 2]}).check()
    if reason == "written in place":
        run_pair(case, name).check()


class ShuffledBelowLM(PlainLM):
    """Blocks that no perturbation reaches run in another order than the one that they are kept in."""

    order = (0, 2, 1, 3)

    def __init__(self) -> None:
        super().__init__(depth=4)

    def body(self, hidden: Tensor) -> Tensor:
        for number in self.order:
            hidden = self.blocks[number](hidden)
        return self.norm(hidden.flatten(0, 1)).view_as(hidden)


class WrittenBelowLM(PlainLM):
    """The loop writes into what the first of them returned."""

    def __init__(self) -> None:
        super().__init__(depth=4)

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        return block(hidden).mul_(1.1) if block is self.blocks[0] else block(hidden)


class TwiceBelowLM(PlainLM):
    """The first of them runs twice, and what it returned at first reaches a later one past the graph."""

    def __init__(self) -> None:
        super().__init__(depth=4)

    def body(self, hidden: Tensor) -> Tensor:
        hidden = self.blocks[0](hidden)
        memory = hidden.detach().mean(1, keepdim=True)
        for number in (0, 1, 2):
            hidden = self.blocks[number](hidden)
        return self.norm(self.blocks[3](hidden + memory).flatten(0, 1)).view_as(hidden)


class PerturbedBelowLM(ShuffledBelowLM):
    """The perturbed block is the second one that runs."""

    order = (0, 3, 1, 2)


@pytest.mark.parametrize("make", [ShuffledBelowLM, WrittenBelowLM, TwiceBelowLM, PerturbedBelowLM])
def test_refused_for_what_happens_below_the_cut(make: Any) -> None:
    case = lm_case(make, tuple(f"blocks.{number}" for number in range(4)))
    assert not is_shared(case.make(), case, "lora", layers=[3])
    run_pair(case, "lora", reg_options={"layers": [3]}).check()


# ------------------------------------------------------------- where the model's own loop does more than call blocks


class MixedLM(PlainLM):
    """Something happens between the blocks."""

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        return block(hidden * 1.5)


class MemoryBlock(nn.Module):
    """Takes a summary of an earlier hidden state, computed by the model's loop without gradients."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor, memory: Tensor | None = None) -> Tensor:
        return self.inner(hidden) + (0 if memory is None else memory)


class MemoryLM(PlainLM):
    """Hidden states reach later blocks past the ones between, detached."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(MemoryBlock(block) for block in self.blocks)

    def body(self, hidden: Tensor) -> Tensor:
        memory = None
        for block in self.blocks:
            hidden = block(hidden, memory)
            memory = hidden.detach().mean(1, keepdim=True)
        return self.norm(hidden.flatten(0, 1)).view_as(hidden)


class TwiceAboveLM(PlainLM):
    """A perturbed block runs twice: all of its runs are above the cut."""

    def body(self, hidden: Tensor) -> Tensor:
        for number in (0, 1, 2, 2, 1):
            hidden = self.blocks[number](hidden)
        return self.norm(hidden.flatten(0, 1)).view_as(hidden)


SHARED = {
    "operations between blocks": lm_case(MixedLM),
    "memory of earlier states": lm_case(MemoryLM),
    "perturbed blocks that run twice": lm_case(TwiceAboveLM),
}


@shares
@pytest.mark.parametrize("reason", SHARED)
@pytest.mark.parametrize("name", ["steering", "lora"])
def test_the_loop_runs_in_both_passes(name: str, reason: str) -> None:
    case = SHARED[reason]
    twice = (
        reason == "perturbed blocks that run twice" and name == "steering"
    )  # which acts behind the block that ends it
    assert is_shared(case.make(), case, name, layers=[1, 2]) == (not twice)
    run_pair(case, name, reg_options={"layers": [1, 2]}).check()


@shares
@pytest.mark.parametrize("make", [CheckpointedLM, GroupedLM])
@pytest.mark.parametrize("name", ["steering", "lora"])
@pytest.mark.parametrize("layers", [[1, 2], [2]], ids=str)
def test_layers_checkpointed_by_the_models_loop(layers: list[int], name: str, make: Any) -> None:
    """They answer inside of their checkpoints, too, and are repeated for the backward of pass 1 alone."""
    model, plain = seeded(make), seeded(PlainLM)
    assert runs_of_first(model, lm_case(make), name, layers=layers) == RUNS_CHECKPOINTED[make]
    assert is_shared(plain, lm_case(PlainLM), name, layers=layers)
    for twin in (model, plain):
        with LfURegularizer(twin, name, alpha=0.05, lam=0.7, layers=layers, seed=1) as reg:
            reg(twin, TINY.batch(), TINY.loss).backward()
    assert_same_gradients(gradients_of(model), gradients_of(plain))


def test_where_torch_does_not_tell_what_is_around_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch 2.6: a checkpoint around the layers would go unnoticed, so nothing is shared with or without one."""
    monkeypatch.setattr(checkpoints, "_innermost_hooks", None)
    for make in (CheckpointedLM, PlainLM):
        case = lm_case(make)
        assert not is_shared(case.make(), case, "steering", layers=[1, 2])
    run_pair(lm_case(PlainLM), "steering", reg_options={"layers": [1, 2]}).check()


@shares
def test_another_ones_hook_on_the_output() -> None:
    """Hooks on the blocks themselves fire in both passes; those inside of them would not."""
    model = LLAMA.make()
    model.model.layers[0].register_forward_hook(lambda m, a, out: out * 1.1)
    assert is_shared(model, LLAMA, "steering", layers="late")
    inside = LLAMA.make()
    inside.model.layers[0].mlp.register_forward_hook(lambda m, a, out: out * 1.1)
    assert not is_shared(inside, LLAMA, "steering", layers="late")
    for hooked in (model, inside):
        for name in ("steering", "lora"):
            found = []
            for strategy in ("released", "retained"):
                hooked.zero_grad()
                with LfURegularizer(hooked, name, alpha=0.05, lam=0.7, layers="late", strategy=strategy, seed=1) as reg:
                    reg(hooked, LLAMA.batch(), LLAMA.loss).backward()
                found.append({n: p.grad.clone() for n, p in hooked.named_parameters()})
            assert_same_gradients(*found)


def test_a_model_called_twice() -> None:
    def twice(model: Any, batch: Batch) -> Tensor:
        flipped = {**batch, "input_ids": batch["input_ids"].flip(0)}
        return LLAMA.loss(model, batch) + LLAMA.loss(model, flipped)

    case = Case("twice", LLAMA.make, LLAMA.batch, twice, LLAMA.mask, LLAMA.layers, 28)
    reg = settled(case.make(), case, "steering", layers="late")
    model = reg._attached.model
    with runs(model, type(blocks_of(model, case)[0])) as counts:
        reg(model, case.batch(), twice)
    assert [counts[block] for block in case.layers] == [4, 4, 4, 4]
    run_pair(case, "steering", reg_options={"layers": "late"}).check()


@shares
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    """A scaled loss may have to be backpropagated again, which a prefix that waits does not allow."""
    model = LLAMA.make().to(dtype)
    case = Case("half", lambda: model, LLAMA.batch, LLAMA.loss, LLAMA.mask, LLAMA.layers, 28)
    assert is_shared(model, case, "steering") == (dtype is torch.bfloat16)


@pytest.mark.parametrize("options", [{"strategy": "retained"}, {"stop_gradient": "none"}], ids=str)
def test_retained_graphs_have_nothing_to_share(options: dict[str, Any]) -> None:
    assert not is_shared(LLAMA.make(), LLAMA, "steering", **options)


# ------------------------------------------------------------- checkpointing and other surroundings


@shares
@pytest.mark.parametrize("layers", ["all", "late"])
@pytest.mark.parametrize("name", ["steering", "lora"])
def test_checkpointed_blocks(name: str, layers: str) -> None:
    """Those of the prefix run again once, as they ran in pass 1."""
    model, plain = LLAMA.make(), LLAMA.make()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for twin in (model, plain):
        twin.config.use_cache = False
        reg = settled(twin, LLAMA, name, layers=layers, seed=1)
        with runs(twin, nn.Linear) as counts:
            reg(twin, LLAMA.batch(), LLAMA.loss).backward()
        reg.remove()
        first = counts["model.layers.0.mlp.up_proj"]
        shared = name == "steering" or layers == "late"
        assert first == (1 if shared else 2) * (2 if twin is model else 1)
    assert_same_gradients(gradients_of(model), gradients_of(plain))


class CallCheckpointedBlock(ResidualBlock):
    """As layers of transformers 4.53 to 4.57, which checkpoint their own call."""

    gradient_checkpointing = True

    def __call__(self, hidden: Tensor) -> Tensor:
        return checkpoint(super().__call__, hidden, use_reentrant=False)


class CallCheckpointedLM(PlainLM):
    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.__class__ = CallCheckpointedBlock


@shares
@pytest.mark.parametrize("name", ["steering", "lora"])
def test_layers_that_checkpoint_their_own_call(name: str) -> None:
    """Whether or not the layer says so."""
    model, plain = seeded(CallCheckpointedLM), seeded(PlainLM)
    assert runs_of_first(model, lm_case(CallCheckpointedLM), name, layers=[1, 2]) == 2  # repeated for its backward
    for twin in (model, plain):
        with LfURegularizer(twin, name, alpha=0.05, lam=0.7, layers=[1, 2], seed=1) as reg:
            reg(twin, TINY.batch(), TINY.loss).backward()
    assert_same_gradients(gradients_of(model), gradients_of(plain))
    for block in model.blocks:
        block.gradient_checkpointing = False
    assert runs_of_first(model, lm_case(CallCheckpointedLM), name, layers=[1, 2]) == 2


@shares
def test_a_call_without_gradients_before_the_one_that_counts() -> None:
    def loss(model: Any, batch: Batch) -> Tensor:
        with torch.no_grad():
            base = LLAMA.loss(model, {**batch, "input_ids": batch["input_ids"].flip(0)})
        return LLAMA.loss(model, batch) + base

    case = Case("base", LLAMA.make, LLAMA.batch, loss, LLAMA.mask, LLAMA.layers, 28)
    assert runs_of_first(case.make(), case, "steering", layers="late") == 3  # twice without gradients
    run_pair(case, "steering", reg_options={"layers": "late"}).check()


def test_a_draft_without_gradients_that_the_call_builds_on() -> None:
    """Its blocks run in pass 2 as well: what they returned in the call that counts is no answer to it."""

    def loss(model: Any, batch: Batch) -> Tensor:
        with torch.no_grad():
            draft = model(input_ids=batch["input_ids"].flip(0), attention_mask=batch["attention_mask"]).logits
        hidden = model.get_input_embeddings()(batch["input_ids"]) + draft.mean(-1, keepdim=True)
        logits = model(inputs_embeds=hidden, attention_mask=batch["attention_mask"]).logits
        return next_token_loss(logits, batch["labels"])

    case = Case("draft", LLAMA.make, LLAMA.batch, loss, LLAMA.mask, LLAMA.layers, 28)
    run_pair(case, "steering", reg_options={"layers": "late"}).check()


@pytest.mark.parametrize("trained", [True, False])
def test_the_prefix_waits_only_for_trained_weights(trained: bool) -> None:
    """The anchor, by which hidden states below every trained weight are in a graph, is none of them."""
    anchor, weight, other = (torch.ones((), requires_grad=True) for _ in range(3))
    cut = tap(torch.ones(2), anchor, Gate(), lambda gradient: ())
    cut = cut * weight if trained else cut
    prefix = shared_backward((cut * other).sum(), cut, anchor)
    assert prefix is not None
    assert [id(leaf) for leaf in prefix.below] == [id(weight)] * trained
    assert prefix.start.requires_grad == trained


@shares
def test_a_cache_made_by_the_model() -> None:
    """transformers hands a new cache to its layers, which those that answer do not fill in pass 2."""
    model = LLAMA.make()
    assert model.config.use_cache
    assert is_shared(model, LLAMA, "steering", layers="late")


@shares
def test_saved_tensor_hooks_around_the_step() -> None:
    model = LLAMA.make()
    reg = settled(model, LLAMA, "steering", layers="late")
    with runs(model, type(model.model.layers[0])) as counts, torch.autograd.graph.save_on_cpu():
        reg(model, LLAMA.batch(), LLAMA.loss)
    assert counts["model.layers.0"] == 1


@shares
def test_another_ones_saved_tensor_hooks() -> None:
    """They expect what they have been given to be used once, and in order."""
    model = LLAMA.make()
    reg = settled(model, LLAMA, "steering", layers="late")
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda packed: packed)
    with runs(model, type(model.model.layers[0])) as counts, hooks:
        reg(model, LLAMA.batch(), LLAMA.loss)
    assert counts["model.layers.0"] == 2


@shares
def test_a_cache_that_no_graph_tells_of() -> None:
    """Frozen layers fill it, and whether others read it is not to be seen."""
    assert not is_shared(FROZEN.make(), FROZEN, "steering", layers=[0, 3])
    run_pair(FROZEN, "steering", reg_options={"layers": [0, 3]}).check()


@shares
def test_embeddings_from_outside() -> None:
    """The loss function computes them with gradients, in both passes."""
    asked: list[int] = []

    def loss(model: Any, batch: Batch) -> Tensor:
        asked.append(1)
        hidden = model.get_input_embeddings()(batch["input_ids"]) * 2
        logits = model(inputs_embeds=hidden, attention_mask=batch["attention_mask"]).logits
        return next_token_loss(logits, batch["labels"])

    case = Case("outside", LLAMA.make, LLAMA.batch, loss, LLAMA.mask, LLAMA.layers, 28)
    reg = settled(case.make(), case, "steering")
    asked.clear()
    reg(reg._attached.model, case.batch(), loss)
    assert len(asked) == 2
    for name in ("steering", "weights"):  # which moves the embedding as well
        run_pair(case, name).check()


def test_an_exception_in_the_prefixs_backward_leaves_everything() -> None:
    model = LLAMA.make()
    reg = settled(model, LLAMA, "steering", layers="late")
    handle = model.model.embed_tokens.register_forward_hook(lambda m, a, out: FailingBackward.apply(out))
    with pytest.raises(KeyError):
        reg(model, LLAMA.batch(), LLAMA.loss)
    handle.remove()
    assert all(parameter.grad is None for parameter in model.parameters())
    reg.remove()
    run_pair(LLAMA, "steering", model=model, reg_options={"layers": "late"}).check()


@shares
def test_a_model_that_changes_its_way() -> None:
    """Blocks that are checkpointed in one step, and not in the next."""
    model = seeded(PlainLM)
    case = lm_case(PlainLM)
    reg = settled(model, case, "steering")
    plain = model.run
    for mixed in (False, True, False):
        if mixed:
            model.run = lambda block, hidden: checkpoint(block, hidden, use_reentrant=False)
        else:
            model.run = plain
        with runs(model, type(model.blocks[0])) as counts:
            loss = reg(model, case.batch(), case.loss)
        assert counts["blocks.0"] == (2 if mixed else 1)
        loss.backward()


@shares
@pytest.mark.parametrize("name", ["steering", "lora"])
def test_a_graph_that_allows_one_backward(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch.compile makes them: what is shared is gone through once, and its share in the ratio is estimated."""

    def refused(shared: Any) -> Any:
        raise RuntimeError("This backward function was compiled with non-empty donated buffers")

    found = []
    for refuses in (False, True):
        if refuses:
            monkeypatch.setattr(SharedBackward, "backward_of_first", refused)
        model, case = seeded(PlainLM), lm_case(PlainLM)
        with LfURegularizer(model, auxiliary(name), alpha=0.05, lam=0.7, layers=[1, 2], seed=1) as reg:
            reg(model, case.batch(), case.loss).backward()
        found.append(gradients_of(model))
    assert_same_gradients(*found)
