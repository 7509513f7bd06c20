"""Bad losses, models and batches: an error in the step, with the cure, and nothing of the model changed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lfu_reg import LfURegularizer
from lfu_reg.auxiliaries import AuxiliaryName
from tests.step.test_inputs import new_cache
from tests.support.cases import seeded
from tests.support.compare import assert_same_gradients, close, gradients_of
from tests.support.harness import run_pair
from tests.support.models import CNN, LLAMA, LSTM, TINY
from tests.support.plain_models import TinyLM
from tests.support.refusals import refuses, refuses_step, says

LOSSES: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "vector": (lambda m, b: m(b["input_ids"]).mean((1, 2)), ("shape", "scalar", "mean")),
    "logits": (lambda m, b: m(b["input_ids"]), ("[3, 7, 13]", "compute the loss")),
    "float": (lambda m, b: TINY.loss(m, b).item(), ("float", "scalar", "without .item()")),
    "array": (lambda m, b: TINY.loss(m, b).detach().numpy(), ("ndarray", "without .item(), float() or .numpy()")),
    "None": (lambda m, b: None, ("NoneType", "scalar", "`return loss`", "no labels")),
    "dict": (lambda m, b: {"loss": TINY.loss(m, b)}, ("dict", "out['loss']", "is_second_pass")),
    "dict of others": (lambda m, b: {"ce": TINY.loss(m, b), "n": 3}, ("dict", "of ['ce', 'n']")),
    "tuple": (lambda m, b: (m(b["input_ids"]), TINY.loss(m, b)), ("tuple", "its element 1")),
    "generator": (lambda m, b: (yield TINY.loss(m, b)), ("generator", "without async and yield")),
    "text": (lambda m, b: "loss", ("str", "scalar")),
    "complex": (lambda m, b: TINY.loss(m, b) + 0j, ("complex", "real scalar")),
    "detached": (lambda m, b: TINY.loss(m, b).detach(), ("requires_grad", "detach")),
    "nan": (lambda m, b: TINY.loss(m, b) * float("nan"), ("nan",)),
    "infinite": (lambda m, b: TINY.loss(m, b) * float("inf"), ("inf",)),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_losses(kind: str) -> None:
    loss, parts = LOSSES[kind]
    refuses_step(parts, loss=loss)


def test_a_loss_instead_of_the_function() -> None:
    loss: Any = torch.tensor(1.0, requires_grad=True)
    refuses_step(("sft_loss_fn is a Tensor", "reg(model, batch, sft_loss_fn)"), loss=loss)


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(), nn.functional.cross_entropy])
def test_a_criterion_instead_of_the_function(criterion: Any) -> None:
    name = getattr(criterion, "__name__", type(criterion).__name__)
    refuses_step((f"sft_loss_fn is {name}", "calls the model and it"), loss=criterion)


def test_the_model_instead_of_the_function() -> None:
    model = TINY.make()
    refuses_step(("sft_loss_fn is TinyLM", "write a function"), model=model, loss=model)


def test_swapped_arguments() -> None:
    call = "reg(model, batch, sft_loss_fn)"
    refuses_step(("model is a dict", call), given=TINY.batch(), batch=nn.Linear(1, 1))
    refuses_step(("model is a function", call), given=TINY.loss)
    batch: Any = TINY.batch()
    refuses_step(("sft_loss_fn is a dict", call), batch=TINY.loss, loss=batch)


@pytest.mark.parametrize("function", [lambda b: None, lambda: None, lambda m, b, c: None, lambda m, *, b: None])
def test_a_loss_function_of_other_arguments(function: Any) -> None:
    refuses_step(("sft_loss_fn has to take (model, batch)", "argument", "lambda model, batch"), loss=function)


def test_errors_of_the_loss_function_are_its_own() -> None:
    model = TINY.make()
    with pytest.raises(TypeError, match="positional argument") as caught:
        LfURegularizer(model, "steering")(model, TINY.batch(), lambda model, batch: model(batch["input_ids"], 3))
    assert "sft_loss_fn" not in str(caught.value)


def test_model_output_instead_of_a_loss() -> None:
    model = LLAMA.make()
    batch = LLAMA.batch()
    reg = LfURegularizer(model, "steering")
    refuses_step(("outputs.loss",), model=model, reg=reg, batch=batch, loss=lambda m, b: m(**b))


def test_a_loss_that_never_runs_the_layers() -> None:
    model = TINY.make()
    refuses_step(("blocks.0",), model=model, loss=lambda m, b: m.head.weight.square().sum())


def test_layers_called_past_their_hooks() -> None:
    class Bypass(TinyLM):
        def body(self, hidden: Tensor) -> Tensor:
            for block in self.blocks:
                hidden = block.forward(hidden)
            return hidden

    model = seeded(Bypass)
    refuses_step(("blocks.0", "forward"), model=model)


def test_a_model_that_is_not_the_attached_one() -> None:
    refuses_step(("TinyLM", "attached"), given=TINY.make())
    refuses_step(("int",), given=3)


def test_a_wrapper_of_the_attached_model_is_fine() -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, ids: Tensor) -> Tensor:
            return self.inner(ids)

    model = TINY.make()
    reg = LfURegularizer(model, "steering")
    assert reg(Wrapper(model), TINY.batch(), TINY.loss).requires_grad


def test_no_module_at_all() -> None:
    with pytest.raises(TypeError, match=says("function", "Module")):
        LfURegularizer(lambda x: x)  # type: ignore[arg-type]


def test_double_attach() -> None:
    model = TINY.make()
    reg = LfURegularizer(model, "steering")
    refuses(model, ("already", "remove()"), "lora")
    refuses(nn.Sequential(model), ("already", "remove()"), "lora", layers=["blocks.0"])
    reg(model, TINY.batch(), TINY.loss)  # the first one goes on


def test_data_parallel() -> None:
    """Refused where it makes copies; with one device or none it calls the model itself."""
    parts = ("DataParallel", "DistributedDataParallel", "several devices")
    refuses(on_two_devices(TINY.make()), parts, "steering")
    refuses(nn.Sequential(on_two_devices(TINY.make())), parts, "steering")
    model = TINY.make()
    refuses_step(parts, model=model, given=on_two_devices(model))


def on_two_devices(model: nn.Module) -> nn.Module:
    wrapped = nn.DataParallel(model)
    wrapped.device_ids = [0, 1]
    return wrapped


@pytest.mark.parametrize("attached", ["the wrapper", "the model", "a wrapper of the wrapper"])
def test_data_parallel_on_one_device(attached: str) -> None:
    expected = run_pair(TINY, "steering").want
    model = TINY.make()
    wrapped = nn.DataParallel(model)
    target: nn.Module = {"the wrapper": wrapped, "the model": model}.get(attached, nn.Sequential(wrapped))
    given = wrapped if attached == "the model" else target
    with LfURegularizer(target, "steering", alpha=0.05, lam=0.7) as reg:
        loss = reg(given, TINY.batch(), TINY.loss)
        loss.backward()
    close(loss.detach(), expected.loss)
    assert_same_gradients(gradients_of(model), expected.gradients)


def test_a_batch_with_a_cache() -> None:
    model = LLAMA.make()
    cache = new_cache(model)
    reg = LfURegularizer(model, "steering")
    for key in ("past_key_values", "memory"):
        batch = {**LLAMA.batch(), key: cache}
        refuses_step(("cache", key, "use_cache=False"), model=model, reg=reg, batch=batch, loss=LLAMA.loss)
        extra = {"undesirable": batch}
        refuses_step(("cache",), model=model, reg=reg, batch=LLAMA.batch(), loss=LLAMA.loss, **extra)


@pytest.mark.parametrize("auxiliary", ["steering", "weights"])
def test_a_layer_without_a_floating_output(auxiliary: str) -> None:
    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.weight).argmax(-1)

    class Model(TinyLM):
        def __init__(self) -> None:
            super().__init__()
            self.rounded = Rounded()

        def body(self, hidden: Tensor) -> Tensor:
            self.rounded(hidden)
            return super().body(hidden)

    model = seeded(Model)
    reg = LfURegularizer(model, auxiliary, layers=["rounded"])
    refuses_step(("rounded", "int64", "layers"), model=model, reg=reg)


def test_used_after_remove() -> None:
    model = TINY.make()
    reg = LfURegularizer(model, "steering")
    reg.remove()
    refuses_step(("remove", "new"), model=model, reg=reg)
    assert "removed" in repr(reg)


def test_a_token_mask_of_the_wrong_shape_or_kind() -> None:
    model = TINY.make()
    for mask, parts in ((torch.ones(2, 5), ("token_mask", "[2, 5]")), (lambda b: "all", ("token_mask", "str"))):
        with LfURegularizer(model, "steering", token_mask=mask) as reg:
            refuses_step(parts, model=model, reg=reg)


def test_a_distance_that_returns_no_scalar() -> None:
    model = TINY.make()
    reg = LfURegularizer(model, "steering", distance=lambda h, p: (p - h).square())
    refuses_step(("distance", "scalar"), model=model, reg=reg)


def test_released_where_gradients_flow_through_the_clean_states() -> None:
    refuses(TINY.make(), ("released", "retained"), "steering", strategy="released", stop_gradient="none")


@pytest.mark.filterwarnings("ignore::lfu_reg.LfUWarning")
@pytest.mark.parametrize("auxiliary", ["lora", "steering", "weights"])
def test_everything_frozen(auxiliary: AuxiliaryName) -> None:
    model = TINY.make().requires_grad_(False)
    number = len(list(model.parameters()))
    parts = (f"All {number} parameters of TinyLM are frozen", "requires_grad_(True)", "get_peft_model")
    refuses_step(parts, model=model, reg=LfURegularizer(model, auxiliary))


def test_a_whole_training_step_instead_of_the_loss() -> None:
    def step(model: nn.Module, batch: Any) -> Tensor:
        loss = TINY.loss(model, batch)
        loss.backward()
        return loss

    model = TINY.make()
    with pytest.raises(RuntimeError, match=says("leave backward(), optimizer.step()", "what the regularizer returns")):
        LfURegularizer(model, "steering")(model, TINY.batch(), step)


def test_state_dict_of_something_else() -> None:
    reg = LfURegularizer(TINY.make(), "steering")
    states: list[Any] = [{"epoch": 3}, TINY.make().state_dict(), None]
    for state in states:
        with pytest.raises(ValueError, match="'step' and 'seed'") as caught:
            reg.load_state_dict(state)
        assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    "broken",
    [
        {"step": "three"},
        {"step": -3},
        {"step": math.nan},
        {"seed": None},
        {"strength": None},
        {"strength": {"alpha": -1.0}},
        {"strength": {"alpha": "much"}},
        {"loss_scales": {"clean": 3}},
    ],
    ids=str,
)
def test_a_broken_state_is_refused_whole(broken: dict[str, Any]) -> None:
    reg = LfURegularizer(TINY.make(), "steering")
    reg.load_state_dict({"step": 2, "seed": 7, "strength": {"alpha": 0.5}})
    before = reg.state_dict()
    with pytest.raises(ValueError, match="cannot be loaded"):
        reg.load_state_dict({"step": 5, "seed": 9, **broken})
    assert reg.state_dict() == before


def test_lstm_and_cnn_work_with_steering() -> None:
    for case in (LSTM, CNN):
        model = case.make()
        LfURegularizer(model, "steering")(model, case.batch(), case.loss).backward()


def test_a_buffer_that_an_evaluation_replaced() -> None:
    """Under inference_mode, as rotary embeddings that grow with the sequence do: such a tensor counts no versions."""
    model = TINY.make()
    model.blocks[0].register_buffer("scale", torch.ones(1), persistent=False)
    with torch.inference_mode():
        model.blocks[0].scale = torch.ones(1)
    reg = LfURegularizer(model, "steering")
    reg(model, TINY.batch(), TINY.loss).backward()
    assert float(reg.metrics["consistency_loss"]) > 0


def test_part_of_a_batch_that_is_not_along_the_first_dimension() -> None:
    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    batch = {"x": torch.randn(9, 3, 4), "labels": torch.ones(3, 9, dtype=torch.long)}
    reg = LfURegularizer(TimeFirst(), "steering", batch_fraction=0.9, seed=0)
    with pytest.raises(ValueError, match="samples along the first dimension"):
        reg(reg._attached.model, batch, lambda model, batch: model(batch["x"]).square().mean())
