"""With many more tokens than hidden units, pass 2 runs with W + s B A instead of thin products: the same gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lfu_reg import LfURegularizer, LoRADeltas
from lfu_reg.auxiliaries.merging import plain_weight
from tests.support.cases import Case
from tests.support.harness import drawn_a_matrices, run_pair
from tests.support.models import FROZEN, GPT2, LLAMA, MIXTRAL, PEFT, TIED, llm_batch

LONG = {"shape": (12, 30)}

pytestmark = pytest.mark.filterwarnings("ignore::lfu_reg.LfUWarning")


def weights_read_in_pass_2(model: nn.Module, reg: LfURegularizer, case: Case) -> list[bool]:
    """For each linear map of the first block that runs in pass 2: whether its weight is the parameter itself."""
    owned = {id(parameter) for parameter in model.parameters()}
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    seen: dict[int, list[bool]] = {}

    def look(module: nn.Module, args: object) -> None:
        seen.setdefault(id(module), []).append(id(module.weight) in owned)

    handles = [module.register_forward_pre_hook(look) for module in linears]
    reg(model, llm_batch(**LONG), case.loss)
    for handle in handles:
        handle.remove()
    return [calls[-1] for calls in seen.values()]


@pytest.mark.parametrize("strategy", ["released", "retained"])
@pytest.mark.parametrize("case", [LLAMA, PEFT, FROZEN, TIED, GPT2, MIXTRAL], ids=lambda case: case.name)
def test_gradients_equal_the_oracles(case: Case, strategy: str) -> None:
    run_pair(case, "lora", batch=llm_batch(**LONG), reg_options={"strategy": strategy}).check()


@pytest.mark.parametrize("steps", [2, 3])
def test_several_ascent_steps(steps: int) -> None:
    model, batch = LLAMA.make(), llm_batch(**LONG)
    drawn = drawn_a_matrices(LLAMA, "lora", model, batch, seed=11)
    options = {"seed": 11}
    run_pair(LLAMA, "lora", model=model, batch=batch, reg_options=options, ascent_steps=steps, a_matrices=drawn).check()


@pytest.mark.parametrize("case", [LLAMA, PEFT, GPT2], ids=lambda case: case.name)
def test_the_weights_are_merged_and_put_back(case: Case) -> None:
    model = case.make()
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    with LfURegularizer(model, LoRADeltas(rank=2)) as reg:
        untouched = weights_read_in_pass_2(model, reg, case)
    assert not all(untouched), "no weight was merged: the test tests nothing"
    for name, parameter in model.named_parameters():
        identity, value = before[name]
        assert id(parameter) == identity
        assert torch.equal(parameter, value)


def test_short_batches_and_half_precision_are_not_merged() -> None:
    model = LLAMA.make()
    short = llm_batch(shape=(1, 4))
    with LfURegularizer(model, LoRADeltas(rank=2)) as reg:
        parameters = [id(p) for p in model.parameters()]
        reg(model, short, LLAMA.loss)
        assert [id(p) for p in model.parameters()] == parameters
        assert not reg.auxiliary._merged  # type: ignore[attr-defined]
    half = LLAMA.make().bfloat16()
    with LfURegularizer(half, LoRADeltas(rank=2)) as reg:
        reg(half, llm_batch(**LONG), LLAMA.loss)
        assert not reg.auxiliary._merged  # type: ignore[attr-defined]


def test_compiled_maps_are_not_merged() -> None:
    """Their graphs would be made anew for every new weight."""
    linear = nn.Linear(2, 2)
    assert plain_weight(linear) is not None
    linear.compile()
    assert plain_weight(linear) is None
