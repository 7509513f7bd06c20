"""What users do to a PEFT model while a regularizer is attached: wrap, switch, disable, merge, unload."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from lfu_reg import LfURegularizer
from tests.support import oracle
from tests.support.cases import next_token_loss
from tests.support.compare import assert_same_gradients, close, gradients_of
from tests.support.harness import a_matrices_of, auxiliary
from tests.support.models import LLAMA, PEFT, llm_batch
from tests.support.oracle_parts import linear_maps
from tests.support.peft_models import ADAPTERS, FIELDS, lora_config
from tests.support.refusals import says
from tests.support.snapshots import hook_counts

AUXILIARIES = ("lora", "steering", "weights")


def wrapped(model: nn.Module, **changes: Any) -> peft.PeftModel:
    torch.manual_seed(3)
    return peft.get_peft_model(model, lora_config(**changes)).double().train()


def attached(model: nn.Module, name: str, **options: Any) -> LfURegularizer:
    return LfURegularizer(model, auxiliary(name), **{"alpha": 0.05, "lam": 0.7, "seed": 3, **options})


def outcome(reg: LfURegularizer, model: nn.Module, loss_fn: Any = LLAMA.loss) -> tuple[float, dict[str, Any]]:
    model.zero_grad()
    loss = reg(model, llm_batch(), loss_fn)
    loss.backward()
    return float(loss.detach()), gradients_of(model)


def same(left: tuple[float, dict[str, Any]], right: tuple[float, dict[str, Any]]) -> None:
    close(left[0], right[0])
    assert_same_gradients(left[1], right[1])


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("name", AUXILIARIES)
@pytest.mark.parametrize("steps_before", [0, 1])
def test_attached_before_get_peft_model(name: str, changes: dict[str, Any], steps_before: int) -> None:
    """The hooks move from the linear maps to the adapter layers around them."""
    model = LLAMA.make()
    reg = attached(model, name)
    for _ in range(steps_before):
        reg(model, llm_batch(), LLAMA.loss).backward()
    adapted = wrapped(model, **changes)
    early = outcome(reg, adapted)
    reg.remove()
    late = attached(adapted, name)
    late.load_state_dict({"step": steps_before, "seed": 3})
    same(early, outcome(late, adapted))


def test_hooks_that_moved_are_removed_as_well() -> None:
    model = LLAMA.make()
    before = hook_counts(model)
    reg = attached(model, "lora")
    adapted = wrapped(model)
    reg(adapted, llm_batch(), LLAMA.loss).backward()
    reg.remove()
    assert hook_counts(adapted.unload()) == before


def test_wrappers_that_run_what_they_wrap_keep_its_hooks() -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

    model = LLAMA.make()
    reg = attached(model, "lora")
    hooks = reg._attached.hooks
    want = outcome(reg, model)
    reg.load_state_dict({"step": 0, "seed": 3})
    model.model.layers[1].mlp = Wrapper(model.model.layers[1].mlp)
    loss, gradients = outcome(reg, model)
    assert reg._attached.hooks is hooks
    same((loss, {key.replace("mlp.inner", "mlp"): value for key, value in gradients.items()}), want)


@pytest.mark.parametrize("name", AUXILIARIES)
def test_adapters_added_and_switched(name: str) -> None:
    """A second adapter, on more maps than the first, and their weighted sum: as with a regularizer made afterwards."""
    model = PEFT.make()
    reg = attached(model, name)
    outcome(reg, model)
    torch.manual_seed(5)
    model.add_adapter("other", lora_config(target_modules=["q_proj", "k_proj"]))
    model.add_adapter("third", lora_config())
    model.add_weighted_adapter(["default", "third"], [0.7, 0.3], "both")
    model.double()
    for active in ("other", "both", "default"):
        model.set_adapter(active)
        reg.load_state_dict({"step": 0, "seed": 3})
        got = outcome(reg, model)
        reg.remove()
        reg = attached(model, name)
        same(got, outcome(reg, model))
        trained = {key for key, gradient in got[1].items() if gradient is not None and bool(gradient.any())}
        assert trained
        assert all(f".{active}." in key for key in trained)


def norms_only(model: nn.Module) -> nn.Module:
    for key, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in key)
    return model


@pytest.mark.parametrize("name", AUXILIARIES)
def test_disable_adapter_around_the_call_leaves_the_deltas_on(name: str) -> None:
    """Only what is trained without the adapters trains: here the norms."""
    model = norms_only(PEFT.make())
    reg = attached(model, name)
    with model.disable_adapter():
        got = outcome(reg, model)
    plain = LLAMA.make()
    weights = {
        key.replace(".base_layer", "").removeprefix("base_model.model."): v for key, v in model.named_parameters()
    }
    plain.load_state_dict({key: value for key, value in weights.items() if "lora_" not in key})
    norms_only(plain)
    setup = oracle.Setup(name, alpha=0.05, lam=0.7)
    a = {key.removeprefix("base_model.model."): matrix for key, matrix in a_matrices_of(reg).items()}
    want = oracle.step(plain, llm_batch(), LLAMA.loss, LLAMA.layers, setup, LLAMA.mask, a_matrices=a)
    close(got[0], want.loss)
    got_gradients = {key.removeprefix("base_model.model."): value for key, value in got[1].items()}
    assert_same_gradients({key: got_gradients[key] for key in want.gradients}, want.gradients)
    assert float(want.consistency) > 0


@pytest.mark.parametrize("name", AUXILIARIES)
def test_a_call_inside_disable_adapter_is_replayed_inside_of_it(name: str) -> None:
    """A replay of the model alone would run with adapters, so the loss function has to run again."""

    def loss(model: Any, batch: Mapping[str, Any]) -> Tensor:
        with model.disable_adapter():
            return LLAMA.loss(model, batch)

    model = norms_only(PEFT.make())
    reg = attached(model, name)
    loss_value, gradients = outcome(reg, model, loss)
    norms_only(model)  # PEFT makes the adapters trainable as it switches them on again
    reg.load_state_dict({"step": 0, "seed": 3})
    with model.disable_adapter():
        want = outcome(reg, model)
    same((loss_value, {key: gradients[key] for key in want[1]}), want)


@pytest.mark.parametrize("name", ["lora", "steering"])
def test_merge_and_unload(name: str) -> None:
    model = PEFT.make()
    reg = attached(model, name)
    outcome(reg, model)
    merged = model.merge_and_unload().requires_grad_(True)
    with pytest.raises(ValueError, match=says("LlamaForCausalLM", "PeftModelForCausalLM", "attach a new")):
        reg(merged, llm_batch(), LLAMA.loss)
    # The PEFT model is now a shell around the merged one, and the hooks have followed.
    reg.load_state_dict({"step": 0, "seed": 3})
    got = outcome(reg, model)
    reg.remove()
    with attached(merged, name) as fresh:
        want = outcome(fresh, merged)
    close(got[0], want[0])
    shell = {key.removeprefix("base_model.model."): value for key, value in got[1].items()}
    assert_same_gradients(shell, want[1])


def test_merge_and_unload_of_a_model_attached_before() -> None:
    model = LLAMA.make()
    reg = attached(model, "lora")
    adapted = wrapped(model)
    outcome(reg, adapted)
    merged = adapted.merge_and_unload().requires_grad_(True)
    reg.load_state_dict({"step": 0, "seed": 3})
    got = outcome(reg, merged)
    assert set(reg.perturbation) == set(linear_maps(merged, LLAMA.layers))
    reg.remove()
    with attached(merged, "lora") as fresh:
        same(got, outcome(fresh, merged))


def test_merge_and_unload_leaves_nothing_to_train() -> None:
    model = PEFT.make()
    reg = attached(model, "steering")
    model.merge_and_unload()
    with pytest.raises(ValueError, match="requires_grad"):
        reg(model, llm_batch(), LLAMA.loss)


def test_a_layer_that_is_gone() -> None:
    model = LLAMA.make()
    reg = attached(model, "lora", layers=[3])
    model.model.layers = model.model.layers[:3]
    with pytest.raises(ValueError, match=says("3 blocks", "there is no 3")):
        reg(model, llm_batch(), LLAMA.loss)


# ------------------------------------------------------------------ calls that PEFT hooks its layers for


def mixed(model: Any, batch: Mapping[str, Any], names: Sequence[str] = ("default", "other", "__base__")) -> Tensor:
    names = list(names)
    out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], adapter_names=names)
    return next_token_loss(out.logits, batch["labels"])


def two_adapters() -> peft.PeftModel:
    model = PEFT.make()
    torch.manual_seed(5)
    model.add_adapter("other", lora_config())
    for key, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in key)
    model.double().train()
    model.base_model.training = False  # PEFT looks here, and refuses mixed batches in training
    return model


def activated() -> peft.PeftModel:
    return wrapped(LLAMA.make(), alora_invocation_tokens=[7, 3])


def invoked(model: Any, batch: Mapping[str, Any]) -> Tensor:
    ids = batch["input_ids"].clone()
    ids[:, 2], ids[:, 3] = 7, 3
    logits = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits
    return next_token_loss(logits, batch["labels"])


CONTEXTS: dict[str, tuple[Callable[[], peft.PeftModel], Any]] = {
    "mixed batch": (two_adapters, mixed),
    **({"activated LoRA": (activated, invoked)} if "alora_invocation_tokens" in FIELDS else {}),
}


def test_a_mixed_batch_after_others() -> None:
    """Layers called one after the other would lack what PEFT hooks them for: at first that makes no difference."""
    found = []
    for strategy in ("released", "retained"):
        model = two_adapters()
        with LfURegularizer(model, "steering", alpha=0.05, lam=0.7, layers="late", strategy=strategy) as reg:
            for loss in (partial(mixed, names=["default"] * 3), mixed):
                model.zero_grad()
                reg(model, llm_batch(), loss).backward()
        found.append(gradients_of(model))
    assert_same_gradients(*found)


@pytest.mark.parametrize("kind", CONTEXTS)
@pytest.mark.parametrize("name", AUXILIARIES)
def test_calls_that_hook_pefts_layers(kind: str, name: str) -> None:
    """Pass 2 runs the call to its end: left early, PEFT would leave its hooks on the model."""
    make, loss = CONTEXTS[kind]
    model = make()
    reg = attached(model, name)
    hooks = hook_counts(model)
    got = outcome(reg, model, loss)
    assert hook_counts(model) == hooks
    twin = make()
    setup = oracle.Setup(name, alpha=0.05, lam=0.7)
    want = oracle.step(twin, llm_batch(), loss, PEFT.layers, setup, PEFT.mask, a_matrices=a_matrices_of(reg))
    close(got[0], want.loss)
    assert_same_gradients(got[1], want.gradients)


def test_a_mixed_batch_among_plain_ones() -> None:
    """The adapters' names are in the second call as well."""
    model = two_adapters()
    reg = attached(model, "steering")
    for _ in range(3):
        reg(model, llm_batch(), PEFT.loss)
    got = outcome(reg, model, mixed)
    want = oracle.step(two_adapters(), llm_batch(), mixed, PEFT.layers, oracle.Setup(alpha=0.05, lam=0.7), PEFT.mask)
    close(got[0], want.loss)
    assert_same_gradients(got[1], want.gradients)


# ------------------------------------------------------------------ layers below the first adapter


@pytest.mark.parametrize("name", AUXILIARIES)
def test_layers_below_the_first_adapter_only(name: str) -> None:
    """Nothing trainable lies before them: the term trains nothing, and that is said."""
    model = ADAPTERS["upper-layers"].make()
    reg = attached(model, name, layers=[0, 1])
    if name == "weights":
        with pytest.warns(match="consistency term has no gradient"):
            loss = reg(model, llm_batch(), LLAMA.loss)
        assert float(reg.metrics["consistency_loss"]) == 0  # no weight before them moves, either
    else:
        with pytest.warns(match="consistency term has no gradient"):
            loss = reg(model, llm_batch(), LLAMA.loss)
        assert float(reg.metrics["consistency_loss"]) > 0
    loss.backward()
    plain = ADAPTERS["upper-layers"].make()
    LLAMA.loss(plain, llm_batch()).backward()
    assert_same_gradients(gradients_of(model), gradients_of(plain), 0.0)
