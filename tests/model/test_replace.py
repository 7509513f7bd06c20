"""A hidden state that is several times in what a layer returns, or in a container of the caller's."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from lfu_reg import LfURegularizer
from lfu_reg.model import outputs

Pair = namedtuple("Pair", "hidden extra")
NEW = torch.full((2, 3), 7.0)


@dataclasses.dataclass
class State:
    hidden: Tensor
    all: list[Any] = dataclasses.field(default_factory=list)
    count: int = dataclasses.field(init=False, default=0)


@dataclasses.dataclass(frozen=True)
class Frozen:
    hidden: Any
    extra: Any = None

    def __post_init__(self) -> None:
        assert self.hidden.shape != NEW.shape or not torch.equal(self.hidden, NEW), "made anew"


def flat(value: Any) -> list[Any]:
    """The things in containers, in order."""
    if dataclasses.is_dataclass(value) and not hasattr(value, "keys"):
        value = [getattr(value, f.name) for f in dataclasses.fields(value)]
    if hasattr(value, "values") and not isinstance(value, Tensor):
        value = list(value.values())
    return [thing for v in value for thing in flat(v)] if isinstance(value, (list, tuple)) else [value]


TWICE: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tensor": lambda h, other: h,
    "UNet down block": lambda h, other: (h, (other, h)),
    "list": lambda h, other: [other, h, [h, [h]]],
    "dict": lambda h, other: {"hidden_states": h, "all": (other, h), "names": ["h"]},
    "OrderedDict": lambda h, other: OrderedDict(out=h, skip=h, other=other),
    "namedtuple": lambda h, other: Pair(h, Pair(other, [h])),
    "ModelOutput": lambda h, other: BaseModelOutput(last_hidden_state=h, hidden_states=(other, h)),
    "dataclass": lambda h, other: State(h, [h, other, {"h": h}]),
    "frozen dataclass": lambda h, other: Frozen(h, (other, h)),
}


@pytest.mark.parametrize("kind", TWICE)
def test_every_place_is_replaced_and_nothing_else(kind: str) -> None:
    h, other = torch.zeros(2, 3), torch.zeros(2, 3)
    output = TWICE[kind](h, other)
    # `locate` takes the first tensor; where that is the other one, the path is given.
    path = outputs.locate(output) if flat(output)[0] is not other else (1,)
    assert path is not None
    before = flat(output)
    made = outputs.replace(output, path, NEW)
    assert type(made) is type(output)
    for now, was in zip(flat(made), before, strict=True):
        assert now is (NEW if was is h else was)
    assert all(now is was for now, was in zip(flat(output), before, strict=True)), "the layer's own object changed"


def test_what_does_not_hold_it_stays_the_same_object() -> None:
    h, others = torch.zeros(2, 3), [torch.zeros(2, 3)]
    made = outputs.replace((h, others, {"more": others}), (0,), NEW)
    assert made[1] is made[2]["more"] is others


def test_a_container_twice_and_one_that_holds_itself() -> None:
    h, inner = torch.zeros(2, 3), []
    inner += [h, "text"]
    made = outputs.replace((inner, inner), (0, 0), NEW)
    assert made[0] is made[1]
    assert made[0] is not inner
    circle: dict[str, Any] = {"hidden_states": h}
    circle["self"] = circle
    assert outputs.replace(circle, ("hidden_states",), NEW)["hidden_states"] is NEW


GIVEN: dict[str, Callable[[Tensor], tuple[Any, Any, Callable[[Any], Tensor]]]] = {
    # What was given, what is returned, and where the caller reads it.
    "dict": lambda h: ((s := {"h": h}), s, lambda s: s["h"]),
    "list": lambda h: ((s := [1, h]), s, lambda s: s[1]),
    "dataclass": lambda h: ((s := State(h, [h])), s, lambda s: s.all[0] if s.all[0] is s.hidden else torch.zeros(1)),
    "dict in a tuple": lambda h: ((s := {"h": h}), (h, s), lambda s: s["h"]),
    "beside the tensor": lambda h: ({"h": h}, h, lambda s: s["h"]),
    "inner list": lambda h: ({"all": [h]}, h, lambda s: s["all"][0]),
}


@pytest.mark.parametrize("kind", GIVEN)
def test_the_callers_container_is_written_to(kind: str) -> None:
    h = torch.zeros(2, 3)
    given, returned, read = GIVEN[kind](h)
    path = outputs.locate(returned)
    assert path is not None
    made = outputs.replace(returned, path, NEW, (torch.zeros(1), given))
    assert read(given) is NEW
    assert made is given if returned is given else made is not returned


def test_what_the_layer_was_given_stays_where_it_was() -> None:
    """A layer that hands back its input has put nothing into a container."""
    h = torch.zeros(2, 3)
    kept = [h]
    assert outputs.replace(h, (), NEW, (h, kept)) is NEW
    assert kept[0] is h


class Down(nn.Module):
    """Returns its hidden state, and what the skip connections take."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.linear(x))
        return h, (x, h)


class SkipNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(Down() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.down:
            x, kept = block(x)
            skips.append(kept[1])
        return x * skips[0] + skips[1]

    def steered(self, x: Tensor, d: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The same by hand, with d added."""
        states: list[Tensor] = []
        for block, vector in zip(self.down, d, strict=True):
            x = torch.tanh(block.linear(x)) + vector
            states.append(x)
        return states[1] * states[0] + states[1], states


class Stateful(nn.Module):
    """Blocks that write to a shared state; what they return is not looked at."""

    def __init__(self, returned: str) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        for block in self.down:
            block.forward = self.writing(block, returned)  # type: ignore[method-assign]

    @staticmethod
    def writing(block: nn.Module, returned: str) -> Any:
        def forward(state: dict[str, Any]) -> Any:
            state["h"] = torch.tanh(nn.functional.linear(state["h"], block.weight, block.bias))
            return state if returned == "state" else state["h"]

        return forward

    def forward(self, x: Tensor) -> Tensor:
        state = {"h": x}
        for block in self.down:
            block(state)
        return state["h"] * 2

    def steered(self, x: Tensor, d: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        states = []
        for block, vector in zip(self.down, d, strict=True):
            x = torch.tanh(nn.functional.linear(x, block.weight, block.bias)) + vector
            states.append(x)
        return states[1] * 2, states


@pytest.mark.parametrize("make", [SkipNet, lambda: Stateful("state"), lambda: Stateful("tensor")])
def test_steps_with_a_hidden_state_in_several_places(make: Any) -> None:
    model, x = make().double(), torch.randn(3, 4, dtype=torch.float64)
    with LfURegularizer(model, "steering", layers=r"down\.\d", alpha=0.3, lam=2.0) as reg:
        loss = reg(model, x, lambda m, b: m(b).square().mean())
        loss.backward()
    got = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    d = [torch.zeros(4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    y, clean = model.steered(x, d)
    g = torch.autograd.grad(y.square().mean(), d, retain_graph=True)
    norm = torch.sqrt(sum(i.square().sum() for i in g))
    _, perturbed = model.steered(x, [0.3 * i / norm for i in g])
    l_cons = sum((a.detach() - b).square().mean() for a, b in zip(clean, perturbed, strict=True)) / 2
    total = y.square().mean() + 2.0 * l_cons
    torch.testing.assert_close(loss.detach(), total.detach(), rtol=1e-10, atol=0)
    want = torch.autograd.grad(total, list(model.parameters()))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-13)
