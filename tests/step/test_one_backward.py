"""strategy="one-backward", against the sum of both terms' gradients by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lfu_reg import LfURegularizer
from lfu_reg.step.one_backward import MEMORY
from tests.support.cases import Batch, Case, seeded
from tests.support.checkpointed import CheckpointedLM, PlainLM, ReentrantLM
from tests.support.compare import Gradients, assert_same_gradients, gradients_of
from tests.support.harness import auxiliary
from tests.support.literal import World
from tests.support.models import LLAMA, PEFT, TINY
from tests.support.plain_models import ResidualBlock
from tests.support.snapshots import Snapshot

AUXILIARIES = ["steering", "lora", "weights"]
LAM = 3.0


def one_backward(model: nn.Module, name: str, **options: Any) -> LfURegularizer:
    settings = {"alpha": 0.05, "lam": LAM, "seed": 3, "strategy": "one-backward", **options}
    return LfURegularizer(model, auxiliary(name), **settings)


def distance_of(kind: str, h: Tensor, h_prime: Tensor) -> Tensor:
    """Over tokens that count [tokens, hidden]."""
    if kind == "cosine":
        return (1 - F.cosine_similarity(h, h_prime, dim=-1)).mean()
    if kind == "sum":
        return (h_prime - h).square().sum(-1).mean()
    return (h_prime - h).square().mean()


@contextmanager
def recorded(
    model: nn.Module, layers: tuple[str, ...], moved: Mapping[str, Any], name: str, counts: Tensor, scale: float = 2.0
) -> Iterator[list[Tensor]]:
    """Outputs of the layers in the block, with the components of `moved` in place."""
    states: list[Tensor] = []
    handles = []
    steered = counts.unsqueeze(-1)
    for site, component in moved.items() if name != "weights" else ():

        def edit(module: Any, args: Any, output: Any, component: Any = component) -> Any:
            y = output if isinstance(output, Tensor) else output[0]
            y = (
                y + steered * component
                if name == "steering"
                else y + scale * (args[0] @ component[0].T) @ component[1].T
            )
            return y if isinstance(output, Tensor) else (y, *output[1:])

        handles.append(model.get_submodule(site).register_forward_hook(edit))
    for layer in layers:

        def keep(module: Any, args: Any, output: Any) -> None:
            states.append(output if isinstance(output, Tensor) else output[0])

        handles.append(model.get_submodule(layer).register_forward_hook(keep))
    named = dict(model.named_parameters())
    try:
        with torch.no_grad():
            for key, delta in moved.items() if name == "weights" else ():
                named[key] += delta
        yield states
    finally:
        with torch.no_grad():
            for key, delta in moved.items() if name == "weights" else ():
                named[key] -= delta
        for handle in handles:
            handle.remove()


def literal(
    case: Case,
    model: nn.Module,
    reg: LfURegularizer,
    name: str,
    batch: Batch,
    kind: str = "mean",
) -> tuple[Gradients, Gradients, float]:
    """The gradient of l_SFT, that of l_cons through the clean states' Jacobian, and l_cons."""
    model, l_cons, at_states = at_the_states(case, model, reg, name, batch, kind)
    with recorded(model, reg.layers, {}, "none", batch["labels"] != -100) as clean:
        sft = case.loss(model, batch)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    of = list(parameters.values())
    first = torch.autograd.grad(sft, of, retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(clean, of, at_states, allow_unused=True)
    return dict(zip(parameters, first, strict=True)), dict(zip(parameters, second, strict=True)), l_cons


def at_the_states(
    case: Case, model: nn.Module, reg: LfURegularizer, name: str, batch: Batch, kind: str
) -> tuple[nn.Module, float, list[Tensor]]:
    """A bare copy of the model, l_cons, and its gradient with respect to the perturbed states."""
    model = bare_copy(model)
    counts = batch["labels"] != -100
    with torch.no_grad():
        with recorded(model, reg.layers, {}, "none", counts) as clean:
            case.loss(model, batch)
        with recorded(model, reg.layers, reg.perturbation, name, counts) as perturbed:
            case.loss(model, batch)
    leaves = [h.detach().requires_grad_() for h in perturbed]
    terms = [distance_of(kind, h[counts], leaf[counts]) for h, leaf in zip(clean, leaves, strict=True)]
    l_cons = torch.stack(terms).mean()
    return model, float(l_cons.detach()), list(torch.autograd.grad(l_cons, leaves, materialize_grads=True))


def bare_copy(model: nn.Module) -> nn.Module:
    """Without gradients, and without hooks of anybody's."""
    model = copy.deepcopy(model)
    model.zero_grad()
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return model


def plus(first: Gradients, second: Gradients, factor: float) -> dict[str, Tensor | None]:
    return {n: g if (h := second[n]) is None else factor * h + (0 if g is None else g) for n, g in first.items()}


def length(gradients: Gradients) -> float:
    return float(torch.cat([g.flatten() for g in gradients.values() if g is not None]).norm())


KINDS: dict[str, dict[str, Any]] = {"mean": {}, "sum": {"reduction": "sum"}, "cosine": {"distance": "cosine"}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", [LLAMA, PEFT], ids=lambda c: c.name)
@pytest.mark.parametrize("layers", ["all", "late"])
@pytest.mark.parametrize("name", AUXILIARIES)
def test_the_gradient_is_the_sum_of_both(name: str, layers: str, case: Case, kind: str) -> None:
    model = case.make()
    reg = one_backward(model, name, layers=layers, **KINDS[kind])
    for seed in range(4):
        model.zero_grad()
        batch = case.batch(seed)
        loss = reg(model, dict(batch), case.loss)
        loss.backward()
        sft, cons, l_cons = literal(case, model, reg, name, batch, kind)
        if seed % 2 == 0:  # brings the direction
            assert_same_gradients(gradients_of(model), sft)
            assert reg.metrics["consistency_loss"] == 0
            continue
        assert l_cons > 1e-9
        assert_same_gradients(gradients_of(model), plus(sft, cons, LAM))
        assert float(reg.metrics["consistency_loss"]) == pytest.approx(l_cons, rel=1e-9)
        assert float(loss.detach()) == pytest.approx(float(reg.metrics["sft_loss"]) + LAM * l_cons, rel=1e-12)


@pytest.mark.parametrize("name", AUXILIARIES)
def test_strength(name: str) -> None:
    """Both gradients are compared at the first steps, and lam is kept from the last of them."""
    model = LLAMA.make()
    reg = one_backward(model, name, lam=None, strength=0.7)
    last = 0.0
    for seed in range(7):
        model.zero_grad()
        batch = LLAMA.batch(seed)
        reg(model, dict(batch), LLAMA.loss).backward()
        if seed % 2 == 0:
            continue
        sft, cons, _ = literal(LLAMA, model, reg, name, batch)
        lam = float(reg.metrics["lam"])
        assert_same_gradients(gradients_of(model), plus(sft, cons, lam))
        if seed <= 3:
            assert lam == pytest.approx(0.7 * length(sft) / length(cons), rel=1e-9)
            assert float(reg.metrics["gradient_ratio"]) == pytest.approx(0.7, rel=1e-6)
        else:
            assert lam == last
        last = lam


def test_the_displacement_is_found_at_the_first_step_with_a_direction() -> None:
    for name in AUXILIARIES:
        model = LLAMA.make()
        with one_backward(model, name, alpha=None, lam=None, strength=1.0) as reg:
            for _ in range(3):
                model.zero_grad()
                reg(model, LLAMA.batch(), LLAMA.loss).backward()
                distance = float(reg.metrics.get("relative_distance", 1e-2))
                assert 1e-2 / 3 < distance < 3e-2, name


def steering_gradient(case: Case, model: nn.Module, reg: LfURegularizer, batch: Batch, lam: float) -> Tensor:
    """The gradient of l_SFT + lam * l_cons with respect to vectors that are added to the layers' outputs, as one."""
    _, _, at_states = at_the_states(case, model, reg, "steering", batch, "mean")
    twin = bare_copy(model)
    counts = batch["labels"] != -100
    width = at_states[0].shape[-1]
    zeros = {layer: torch.zeros(width, dtype=torch.float64, requires_grad=True) for layer in reg.layers}
    with recorded(twin, reg.layers, zeros, "steering", counts) as states:
        total = case.loss(twin, batch)
    total = total + lam * sum((h * g).sum() for h, g in zip(states, at_states, strict=True))
    return torch.cat(torch.autograd.grad(total, [zeros[layer] for layer in sorted(zeros)]))


@pytest.mark.parametrize("name", ["steering", "weights"])
def test_the_direction_is_a_mean_of_what_plain_backward_passes_brought(name: str) -> None:
    """Of gradients of length one, of l_SFT alone; the factor that a GradScaler puts on the loss does not matter."""
    model = TINY.make()
    reg = one_backward(model, name)
    mean: Tensor | None = None
    for seed in range(6):
        model.zero_grad()
        batch = TINY.batch(seed)
        loss = reg(model, dict(batch), TINY.loss)
        if seed % 2:
            assert mean is not None
            moved = torch.cat([delta.flatten() for _, delta in sorted(reg.perturbation.items())])
            torch.testing.assert_close(moved, 0.05 * mean / mean.norm(), rtol=1e-9, atol=1e-12)
        (loss * 2.0**seed).backward()
        if seed % 2:
            continue
        if name == "steering":
            flat = steering_gradient(TINY, model, reg, batch, 0.0)
        else:
            flat = torch.cat([p.grad.flatten() for _, p in sorted(model.named_parameters()) if p.grad is not None])
        unit = flat / flat.norm()
        mean = unit if mean is None else MEMORY * mean + (1 - MEMORY) * unit


def test_a_backward_that_overflowed_brings_no_direction() -> None:
    model = TINY.make()
    reg = one_backward(model, "steering")
    reg(model, TINY.batch(), TINY.loss).backward()
    reg(model, TINY.batch(), TINY.loss).backward(torch.tensor(float("inf"), dtype=torch.float64))
    reg(model, TINY.batch(), TINY.loss).backward()
    assert all(torch.isfinite(delta).all() for delta in reg.perturbation.values())


@pytest.mark.parametrize("name", AUXILIARIES)
def test_tokens_and_a_part_of_the_batch(name: str) -> None:
    """Of four equal samples any two say the same."""
    model = TINY.make()
    one = TINY.batch(5, shape=(1, 7))
    batch = {key: value.expand(4, -1).contiguous() for key, value in one.items()}
    reg = one_backward(model, name, batch_fraction=0.5, token_mask=lambda b: b["labels"] != -100)
    for _ in range(2):
        model.zero_grad()
        reg(model, dict(batch), TINY.loss).backward()
    sft, cons, _ = literal(TINY, model, reg, name, batch)
    assert_same_gradients(gradients_of(model), plus(sft, cons, LAM))


def test_micro_batches_add_up() -> None:
    model = TINY.make()
    reg = one_backward(model, "steering")
    reg(model, TINY.batch(9), TINY.loss).backward()
    model.zero_grad()
    want: dict[str, Tensor | None] = {}
    for seed in range(4):
        batch = TINY.batch(seed)
        (reg(model, dict(batch), TINY.loss) / 4).backward()
        sft, cons, _ = literal(TINY, model, reg, "steering", batch)
        part = {n: None if g is None else g / 4 for n, g in plus(sft, cons, LAM).items()}
        want = plus(want, part, 1.0) if want else part
    assert_same_gradients(gradients_of(model), want)


# ------------------------------------------------------------------ what the exact step cannot have


def trained(make: Callable[[], nn.Module], name: str, prepare: Callable[[Any], None], **options: Any) -> list[Tensor]:
    """Weights after four steps of SGD."""
    model = make()
    prepare(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with one_backward(model, name, **options) as reg:
        for seed in range(4):
            optimizer.zero_grad()
            reg(model, TINY.batch(seed), TINY.loss).backward()
            optimizer.step()
    return [p.detach() for p in model.parameters()]


def nothing(model: Any) -> None:
    """As it is."""


def same(one: list[Tensor], other: list[Tensor]) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


class InsideCheckpointed(ResidualBlock):
    """Its output is outside of the checkpoint."""

    reentrant = True

    def forward(self, hidden: Tensor) -> Tensor:
        return checkpoint(super().forward, hidden, use_reentrant=self.reentrant)


def inside(model: Any) -> None:
    """Checkpoints inside of the blocks that hide their graph."""
    for block in model.blocks:
        block.__class__ = InsideCheckpointed


@pytest.mark.parametrize("name", AUXILIARIES)
def test_checkpointing(name: str) -> None:
    """Reentrant checkpoints, too, but for LoRA's linear maps inside of them, whose outputs have no graph."""
    plain = trained(lambda: seeded(PlainLM), name, nothing)
    same(trained(lambda: seeded(CheckpointedLM), name, nothing), plain)
    if name != "lora":
        same(trained(lambda: seeded(PlainLM), name, inside), plain)


@pytest.mark.parametrize("name", ["steering", "weights"])
def test_strength_with_checkpoints(name: str) -> None:
    """Reentrant ones hide the gradients that it follows from."""
    model = seeded(PlainLM)
    inside(model)
    with one_backward(model, name, lam=None, strength=1.0) as reg:
        reg(model, TINY.batch(), TINY.loss).backward()
        with pytest.raises(ValueError, match=r"strength=1.0 .*reentrant checkpoints.*Give lam"):
            reg(model, TINY.batch(), TINY.loss)
    options: dict[str, Any] = {"lam": None, "strength": 1.0}
    same(
        trained(lambda: seeded(CheckpointedLM), name, nothing, **options),
        trained(lambda: seeded(PlainLM), name, nothing, **options),
    )


def test_layers_inside_of_reentrant_checkpoints_are_refused() -> None:
    """Their outputs have no graph when the loss is computed."""
    model = seeded(ReentrantLM)
    with pytest.raises(RuntimeError, match=r"reentrant checkpoints do: use_reentrant=False"):
        one_backward(model, "steering")(model, TINY.batch(), TINY.loss)


@pytest.mark.parametrize("name", AUXILIARIES)
def test_an_optimizer_that_steps_inside_of_the_backward(name: str) -> None:
    """Each parameter is updated, and its gradient dropped, as soon as it has arrived."""

    def fused(model: Any) -> None:
        def update(parameter: Tensor) -> None:
            with torch.no_grad():
                parameter.sub_(0.05 * parameter.grad)  # type: ignore[operator]
            parameter.grad = None

        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(update)

    same(trained(TINY.make, name, fused), trained(TINY.make, name, nothing))


@pytest.mark.parametrize("name", AUXILIARIES)
def test_compiled(name: str) -> None:
    def compiled(model: Any) -> None:
        for block in model.blocks:
            block.compile(backend="aot_eager")

    torch.compiler.reset()
    plain = trained(TINY.make, name, nothing)
    same(trained(TINY.make, name, compiled), plain)
    strength: dict[str, Any] = {"lam": None, "strength": 1.0}
    with pytest.raises(ValueError, match=r"donated_buffer = False.*Give lam"):
        trained(TINY.make, name, compiled, **strength)
    with torch._functorch.config.patch(donated_buffer=False):
        same(trained(TINY.make, name, compiled, **strength), trained(TINY.make, name, nothing, **strength))


def test_activations_that_are_kept_elsewhere() -> None:
    """By somebody who gives each of them back once."""
    kept: dict[int, Tensor] = {}

    def put(tensor: Tensor) -> int:
        kept[len(kept)] = tensor.clone()
        return len(kept) - 1

    def take(key: int) -> Tensor:
        tensor = kept[key]
        kept[key] = torch.full_like(tensor, torch.nan) if tensor.is_floating_point() else torch.zeros_like(tensor)
        return tensor

    def loss(model: Any, batch: Batch) -> Tensor:
        if reg.is_second_pass:
            return TINY.loss(model, batch)
        with torch.autograd.graph.saved_tensors_hooks(put, take):
            return TINY.loss(model, batch)

    model = TINY.make()
    with one_backward(model, "steering") as reg:
        for seed in range(3):
            model.zero_grad()
            batch = TINY.batch(seed)
            reg(model, dict(batch), loss).backward()
        sft, cons, _ = literal(TINY, model, reg, "steering", batch)
        assert_same_gradients(gradients_of(model), plus(sft, cons, LAM))


# ------------------------------------------------------------------ what it refuses, and leaves


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ascent_steps": 2}, r"ascent_steps=2 .*strategy='auto'"),
        ({"sync_perturbation": True}, r"sync_perturbation=True .*strategy='auto'"),
        ({"stop_gradient": "none"}, r"strategy='one-backward' holds the clean hidden states fixed"),
        ({"stop_gradient": "perturbed"}, r"stop_gradient='perturbed'"),
    ],
    ids=str,
)
def test_settings_that_contradict_it(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        one_backward(TINY.make(), "steering", **options)


def test_an_undesirable_batch_is_refused() -> None:
    model = TINY.make()
    reg = one_backward(model, "steering")
    reg(model, TINY.batch(), TINY.loss).backward()
    with pytest.raises(ValueError, match=r"earlier backward passes. undesirable= asks for one of its own"):
        reg(model, TINY.batch(), TINY.loss, undesirable=TINY.batch(1))


@pytest.mark.parametrize("name", AUXILIARIES)
def test_nothing_is_left_on_the_model(name: str) -> None:
    """Between a step and its backward, and after the last one, too."""
    for backward in (True, False):
        model = TINY.make()
        before = Snapshot.of(model)
        reg = one_backward(model, name)
        for _ in range(2):
            loss = reg(model, TINY.batch(), TINY.loss)
            if backward:
                loss.backward()
        model.zero_grad()
        reg.remove()
        before.check(model)
        assert not any(parameter._backward_hooks for parameter in model.parameters())


def test_an_evaluation_between_steps() -> None:
    model, twin = TINY.make(), TINY.make()
    found = []
    for one, evaluates in ((model, True), (twin, False)):
        with one_backward(one, "lora") as reg:
            for seed in range(3):
                one.zero_grad()
                loss = reg(one, TINY.batch(seed), TINY.loss)
                if evaluates:
                    with torch.no_grad():
                        reg(one, TINY.batch(7), TINY.loss)
                loss.backward()
            found.append(gradients_of(one))
    assert_same_gradients(*found)


class Weighed(World):
    """Two terms, each divided by its gradient at the last weight (GradNorm, VQGAN), or a gradient by torch.func."""

    def loss(self, model: Any, batch: Any) -> Tensor:
        both = self.terms(model, batch)
        return sum((term / self.length(term, model) for term in both), torch.zeros(()))

    def terms(self, model: Any, batch: Any) -> tuple[Tensor, ...]:
        off = (model(batch["x"]) - batch["y"]).square()
        return off[:, :2].mean(), off[:, 2:].mean()

    def length(self, term: Tensor, model: Any) -> Tensor:
        return torch.autograd.grad(term, model.out.weight, retain_graph=True)[0].norm().detach()


class Transformed(Weighed):
    def length(self, term: Tensor, model: Any) -> Tensor:
        return torch.func.grad(lambda h: model.out(h).square().sum())(torch.ones(6).double()).norm().detach()


@pytest.mark.parametrize("name", AUXILIARIES)
@pytest.mark.parametrize("world", [Weighed, Transformed])
def test_a_loss_that_takes_gradients_of_its_own(world: type[Weighed], name: str) -> None:
    """As where the weights are known beforehand."""
    found = []
    for beforehand in (True, False):
        torch.manual_seed(0)
        ours = world()
        with one_backward(ours.model, name) as reg:
            for step in range(4):
                ours.model.zero_grad()
                batch, loss = ours.batch(step), ours.loss
                if beforehand:
                    known = [ours.length(term, ours.model) for term in ours.terms(ours.model, batch)]
                    loss = lambda m, b, known=known: sum(t / k for t, k in zip(ours.terms(m, b), known, strict=True))  # type: ignore[misc]  # noqa: B023, E731
                reg(ours.model, batch, loss).backward()
        assert float(reg.metrics["consistency_loss"]) > 0
        found.append(gradients_of(ours.model))
    assert_same_gradients(*found)


@pytest.mark.parametrize("name", ["lora", "steering"])
def test_gradients_of_gradients_are_refused(name: str) -> None:
    """At once: the caller's backward would bring a direction without what they depend on."""

    class Penalty(World):
        def loss(self, model: Any, batch: Any) -> Tensor:
            x = batch["x"].requires_grad_()
            out = model(x)
            return out.square().mean() + torch.autograd.grad(out.sum(), x, create_graph=True)[0].square().mean()

    ours = Penalty()
    with (
        one_backward(ours.model, name) as reg,
        pytest.raises(ValueError, match=r"gradients of gradients.*strategy='auto'"),
    ):
        reg(ours.model, ours.batch(0), ours.loss)


@pytest.mark.parametrize("way", ["another loss", "a gradient before"])
@pytest.mark.parametrize("name", AUXILIARIES)
def test_the_direction_comes_from_the_backward_of_the_loss(name: str, way: str) -> None:
    """From none of another loss of the same weights, and once where a part of the way is gone twice."""
    found = []
    for disturbed in ("", way):
        torch.manual_seed(0)
        ours = World()
        with one_backward(ours.model, name) as reg:
            for step in range(4):
                ours.model.zero_grad()
                loss = reg(ours.model, ours.batch(step), ours.loss)
                if disturbed == "a gradient before":
                    torch.autograd.grad(loss, ours.model.layers[2].b.weight, retain_graph=True)
                loss.backward()
                kept = {key: weight.grad.clone() for key, weight in ours.trained().items()}  # type: ignore[union-attr]
                if disturbed == "another loss":
                    ours.loss(ours.model, ours.batch(7)).backward()
            found.append(kept)
    assert_same_gradients(*found)
