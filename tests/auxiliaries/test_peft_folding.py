"""LoRA deltas folded into the rank of PEFT adapters: no tap, no product more than steering has, the same figures."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lfu_reg import LfURegularizer, LfUWarning, LoRADeltas
from lfu_reg.model import peft as adapters
from lfu_reg.step.reused_blocks import ReusedBlocks
from tests.support.architectures import llama
from tests.support.cases import Case
from tests.support.compare import assert_same_gradients, gradients_of
from tests.support.harness import auxiliary, drawn_a_matrices, run_pair
from tests.support.models import PEFT, llm_batch
from tests.support.oracle_parts import linear_maps
from tests.support.peft_models import ADAPTERS, adapted, lora_config
from tests.support.refusals import refuses_step

pytestmark = pytest.mark.filterwarnings("ignore::lfu_reg.LfUWarning")

EVERYWHERE = replace(
    PEFT, make=adapted(llama, lambda: lora_config(target_modules="all-linear", r=3)), name="every linear map"
)
SETTINGS: dict[str, dict[str, Any]] = {
    "released": {},
    "retained": {"reg_options": {"strategy": "retained"}},
    "perturbed": {"stop_gradient": "perturbed"},
    "none": {"stop_gradient": "none"},
    "undesirable": {"undesirable": llm_batch(77)},
}


@contextmanager
def hooked_calls() -> Iterator[Counter[tuple[str, str]]]:
    """Which sites are tapped in pass 1, and which get thin products at their outputs in pass 2."""
    seen: Counter[tuple[str, str]] = Counter()
    observe, apply = LoRADeltas.observe, LoRADeltas.apply
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoRADeltas, "observe", lambda s, c: (seen.update([("tap", c.name)]), observe(s, c))[1])
        patch.setattr(LoRADeltas, "apply", lambda s, cs, c: (seen.update([("add", c.name)]), apply(s, cs, c))[1])
        yield seen


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += str(function).split(".")[1] in ("mm", "addmm", "bmm", "baddbmm")
        return function(*args, **(kwargs or {}))


def products_of(name: str, case: Case = EVERYWHERE) -> int:
    model = case.make()
    # Somebody's hook, so that steering does not run the first block once only.
    model.get_submodule(case.layers[0]).register_forward_hook(lambda *call: None)
    with LfURegularizer(model, auxiliary(name)) as reg:
        reg(model, case.batch(), case.loss).backward()  # the first step also checks the replay
        with Products() as products:
            reg(model, case.batch(), case.loss).backward()
    return products.number


def unfolded(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(adapters, "plain_lora", lambda module: None)


def one_step(case: Case, model: nn.Module | None = None, **options: Any) -> tuple[Any, dict[str, Tensor | None]]:
    model = case.make() if model is None else model
    with LfURegularizer(model, auxiliary("lora"), **{"alpha": 0.05, "lam": 0.7, "seed": 3, **options}) as reg:
        reg(model, case.batch(), case.loss).backward()
        return reg.perturbation, gradients_of(model)


@pytest.mark.parametrize("rank", [2, 3])  # 3: a scale that differs from the adapter's
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", ["lora", "rslora", "upper-layers", "everywhere"])
def test_gradients_equal_the_oracles(kind: str, setting: str, rank: int) -> None:
    case = EVERYWHERE if kind == "everywhere" else ADAPTERS[kind]
    with hooked_calls() as calls:
        options = {"aux_options": {"rank": rank}, "setup": {"scale": 4 / rank}, **SETTINGS[setting]}
        run_pair(case, "lora", **options).check()
    wrapped = {name for name, module in case.make().named_modules() if adapters.plain_lora(module)}
    assert wrapped
    assert not wrapped & {name for _, name in calls}


@pytest.mark.parametrize("strategy", ["released", "retained"])
def test_further_ascent_steps(strategy: str) -> None:
    model = EVERYWHERE.make()
    drawn = drawn_a_matrices(EVERYWHERE, "lora", model, EVERYWHERE.batch(), seed=11)
    options = {"seed": 11, "strategy": strategy}
    with hooked_calls() as calls:
        run_pair(EVERYWHERE, "lora", model=model, reg_options=options, ascent_steps=3, a_matrices=drawn).check()
    assert not calls


def test_no_product_more_than_with_steering_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ReusedBlocks, "cut", lambda *args: None)  # which saves steering vectors the first block
    assert products_of("lora") == products_of("steering")


@pytest.mark.parametrize("case", [PEFT, EVERYWHERE], ids=lambda case: case.name)
def test_a_step_is_the_same_as_without_folding(case: Case) -> None:
    """A is drawn in the same order, B moves as far."""
    delta, gradients = one_step(case)
    with pytest.MonkeyPatch.context() as patch:
        unfolded(patch)
        want, expected = one_step(case)
    assert list(delta) == list(want)
    for (a, b), (other_a, other_b) in zip(delta.values(), want.values(), strict=True):
        assert torch.equal(a, other_a)
        torch.testing.assert_close(b, other_b, rtol=1e-9, atol=1e-12)
        assert not a.requires_grad
        assert not b.requires_grad
    assert_same_gradients(gradients, expected)


def second_adapter(model: Any) -> Any:
    model.add_adapter("other", lora_config())
    model.base_model.set_adapter(["default", "other"])
    return model.double()


def hooked(model: Any) -> Any:
    for name, module in model.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_hook(lambda m, args, out: out * 1.5)
    return model


def frozen(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    return model


def merged(model: Any) -> Any:
    """Its matrices stay trainable, but take no part."""
    trained_embeddings(model).merge_adapter()
    return model


def doubled(module: nn.Module, *args: Any) -> Tensor:
    return 2 * type(module).forward(module, *args)


def with_forwards_of_their_own(model: Any) -> Any:
    """As hooks of accelerate have them."""
    for module in model.modules():
        if adapters.plain_lora(module):
            module.forward = functools.partial(doubled, module)
    return model


CHANGES: dict[str, Callable[[Any], Any]] = {
    "two adapters": second_adapter,
    "hooks": hooked,
    "frozen": frozen,
    "merged": merged,
    "forwards of their own": with_forwards_of_their_own,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_a_plain_adapter_is_left_to_taps(change: str) -> None:
    with hooked_calls() as calls:
        model = CHANGES[change](PEFT.make())
        mine = copy.deepcopy(model)
        if change == "hooks":  # the oracle clears all hooks of its copy
            unfold = pytest.MonkeyPatch.context()
            with LfURegularizer(model, auxiliary("lora"), alpha=0.05, lam=0.7, seed=3) as reg:
                reg(model, PEFT.batch(), PEFT.loss).backward()
            got = {key for kind, key in calls if kind == "tap"}
            with unfold as patch:
                unfolded(patch)
                _, want = one_step(PEFT, mine)
            assert_same_gradients(gradients_of(model), want)
        else:
            run_pair(PEFT, "lora", model=model).check()
            got = {key for kind, key in calls if kind == "tap"}
    assert got == set(linear_maps(mine, PEFT.layers))


@pytest.mark.parametrize("when", ["before the regularizer", "after it"])
def test_compiled_models_are_left_to_taps(when: str) -> None:
    model = EVERYWHERE.make()
    part = model.get_submodule(f"{EVERYWHERE.layers[1]}.mlp.act_fn")  # any part is enough
    if when == "before the regularizer":
        part.compile(backend="eager")
    with hooked_calls() as calls, LfURegularizer(model, auxiliary("lora")) as reg:
        if when == "after it":
            part.compile(backend="eager")
        reg(model, EVERYWHERE.batch(), EVERYWHERE.loss).backward()
    assert {key for what, key in calls if what == "tap"} == set(linear_maps(model, EVERYWHERE.layers))


def test_transforms_are_refused_as_everywhere() -> None:
    """And not by what a fold would do in one first: draw random numbers."""
    model = PEFT.make()
    layer = model.get_submodule(f"{PEFT.layers[1]}.mlp.down_proj")

    def loss(model: Any, batch: Mapping[str, Any]) -> Tensor:
        return torch.vmap(layer)(torch.ones(2, 3, 24, dtype=torch.float64)).sum() + PEFT.loss(model, batch)

    reg = LfURegularizer(model, auxiliary("lora"))
    refuses_step(("torch.func", "outside"), model=model, reg=reg, batch=PEFT.batch(), loss=loss)


@pytest.mark.parametrize("kind", ["dora", "lora-bias", "ia3", "loha", "adalora", "oft"])
def test_other_adapters_are_left_to_taps(kind: str) -> None:
    with hooked_calls() as calls:
        one_step(ADAPTERS[kind])
    assert {key for what, key in calls if what == "tap"} == set(linear_maps(ADAPTERS[kind].make(), PEFT.layers))


@pytest.mark.parametrize(("p", "folds"), [(0.0, True), (0.3, False)])
def test_dropout(p: float, folds: bool) -> None:
    """The delta's input is what goes into the map; with dropout the adapter's is another."""
    case = replace(PEFT, make=adapted(llama, lambda: lora_config(lora_dropout=p)))
    with hooked_calls() as calls:
        run_pair(case, "lora", seed=5).check()
    assert any(name.endswith("q_proj") for _, name in calls) != folds


def penalised(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """A penalty on the weights, of which no component is a part."""
    return PEFT.loss(model, batch) + 0.1 * sum(p.square().sum() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("steps", [1, 2])
def test_the_users_loss_sees_the_weights_that_are_trained(steps: int) -> None:
    case = replace(EVERYWHERE, loss=penalised)
    model = case.make()
    drawn = drawn_a_matrices(case, "lora", model, case.batch(), seed=11)
    options = {"seed": 11}
    run_pair(case, "lora", model=model, reg_options=options, ascent_steps=steps, a_matrices=drawn).check()


def with_and_without(model: Any, batch: Mapping[str, Any]) -> Tensor:
    with model.disable_adapter():
        base = PEFT.loss(model, batch)
    return PEFT.loss(model, batch) + 0.5 * base


@pytest.mark.parametrize("strategy", ["released", "retained"])
def test_calls_with_the_adapter_disabled_get_the_delta_all_the_same(strategy: str) -> None:
    case = replace(PEFT, make=lambda: trained_embeddings(PEFT.make()), loss=with_and_without)
    run_pair(case, "lora", reg_options={"strategy": strategy}).check()


def behind_a_reference(model: Any, batch: Mapping[str, Any]) -> Tensor:
    with torch.no_grad():
        reference = PEFT.loss(model, batch)
    return PEFT.loss(model, batch) * (1 + reference)


@pytest.mark.parametrize("strategy", ["released", "retained"])
def test_a_call_without_gradients_before_the_one_that_counts(strategy: str) -> None:
    case = replace(EVERYWHERE, loss=behind_a_reference)
    _, gradients = one_step(case, strategy=strategy)
    with pytest.MonkeyPatch.context() as patch:
        unfolded(patch)
        _, expected = one_step(case, strategy=strategy)
    assert_same_gradients(gradients, expected)


def trained_embeddings(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or "embed" in name)
    return model


def test_checkpointed_blocks_run_again_with_what_they_had() -> None:
    model = EVERYWHERE.make()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with hooked_calls() as calls:
        assert_same_gradients(one_step(EVERYWHERE, model)[1], one_step(EVERYWHERE)[1])
    assert not calls


class Stop(Exception):
    pass


@pytest.mark.parametrize("pass_number", [1, 2])
def test_everything_is_back_after_an_exception(pass_number: int) -> None:
    model = EVERYWHERE.make()
    before = {name: id(p) for name, p in model.named_parameters()}
    runs: list[int] = []

    def fail(module: nn.Module, args: Any) -> None:
        runs.append(1)
        if len(runs) >= pass_number:
            raise Stop

    with LfURegularizer(model, auxiliary("lora")) as reg:
        handle = model.get_submodule(EVERYWHERE.layers[2]).register_forward_pre_hook(fail)
        with pytest.raises(Stop):
            reg(model, EVERYWHERE.batch(), EVERYWHERE.loss)
        handle.remove()
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


class Bypassing(nn.Module):
    """Runs the adapter layer without its hooks."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner.forward(hidden)


def test_a_layer_whose_hooks_are_bypassed_has_its_delta_all_the_same() -> None:
    model, plain = EVERYWHERE.make(), EVERYWHERE.make()
    name = f"{EVERYWHERE.layers[1]}.mlp"
    block = model.get_submodule(name)
    block.up_proj = Bypassing(block.up_proj)
    with pytest.warns(LfUWarning, match="never ran"):
        delta, gradients = one_step(EVERYWHERE, model)
    assert bool(delta[f"{name}.up_proj.inner"][1].any())
    got = {key.replace("up_proj.inner", "up_proj"): gradient for key, gradient in gradients.items()}
    assert_same_gradients(got, one_step(EVERYWHERE, plain)[1])


@pytest.mark.parametrize("way", ["autocast", "bfloat16", "float32 adapters"])
@pytest.mark.parametrize("folds", [True, False])
def test_half_precision_is_near_float64(way: str, folds: bool) -> None:
    _, want = one_step(EVERYWHERE)
    model = EVERYWHERE.make().float() if way == "autocast" else EVERYWHERE.make().bfloat16()
    if way == "float32 adapters":
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.data = parameter.data.float()
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        if not folds:
            unfolded(patch)
        _, got = one_step(EVERYWHERE, model)
    got_all, want_all = (torch.cat([g.flatten().double() for g in gs.values() if g is not None]) for gs in (got, want))
    assert float((got_all - want_all).norm() / want_all.norm()) < 0.1


def test_a_fold_is_no_leak() -> None:
    """Neither the model nor the graph of a step is kept by the auxiliary after remove()."""
    model = EVERYWHERE.make()
    reg = LfURegularizer(model, auxiliary("lora"))
    reg(model, EVERYWHERE.batch(), EVERYWHERE.loss).backward()
    reg.remove()
    held = vars(reg.auxiliary)
    assert not held["_linears"]
    assert not held["_adapters"]
