"""Moved weights are seen wherever somebody keeps them, stay leaves, and get back what they were."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lfu_reg import LfURegularizer, WeightDeltas


class Recurrent(nn.Module):
    def __init__(self, kind: Any, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.rnn = kind(4, 4, batch_first=True, **options)
        self.head = nn.Linear(8 if options.get("bidirectional") else 4, 9)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(ids))[0])


class Listed(nn.Module):
    """A block that reads its weights from a place of its own."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        up, down = self.up.weight, self.down.weight
        self.where = where
        self.kept: Any = [up, down] if where == "list" else {"all": [(up, [down])]}
        self.__dict__["hidden"] = up  # registered nowhere under this name

    def weights(self) -> tuple[Tensor, Tensor]:
        if self.where == "nested":
            return self.kept["all"][0][0], self.kept["all"][0][1][0]
        return (self.hidden, self.down.weight) if self.where == "attribute" else (self.kept[0], self.kept[1])

    def forward(self, h: Tensor) -> Tensor:
        up, down = self.weights()
        return h + torch.tanh(h @ up.T + self.up.bias) @ down.T


class Holder(nn.Module):
    """The parent holds the weights of the blocks inside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.shared = [block.weight for block in self.blocks]
        self.same = self.shared

    def forward(self, h: Tensor) -> Tensor:
        for weight, block in zip(self.same, self.blocks, strict=True):
            h = torch.tanh(block(h) + h @ weight)
        return h


def by_hand(model: nn.Module, layers: list[str], x: Tensor, loss_fn: Any) -> tuple[Tensor, list[Tensor]]:
    """The loss with weights that are really moved, and its gradients with respect to the unmoved ones."""
    clean, moved = copy.deepcopy(model), copy.deepcopy(model)
    g = torch.autograd.grad(loss_fn(clean, x), list(clean.parameters()))
    norm = torch.sqrt(sum(i.square().sum() for i in g))
    with torch.no_grad():
        for parameter, i in zip(moved.parameters(), g, strict=True):
            parameter += 0.5 * i / norm
    seen: list[list[Tensor]] = [[], []]
    for twin, states in zip((clean, moved), seen, strict=True):
        for name in layers:
            twin.get_submodule(name).register_forward_hook(
                lambda m, a, out, states=states: states.append(out[0] if isinstance(out, tuple) else out)
            )
    sft_loss = loss_fn(clean, x)
    loss_fn(moved, x)
    pairs = list(zip(*seen, strict=True))
    l_cons = sum((h.detach() - other).square().mean() for h, other in pairs) / len(pairs)
    one = torch.autograd.grad(sft_loss, list(clean.parameters()))
    other = torch.autograd.grad(5.0 * l_cons, list(moved.parameters()), allow_unused=True)
    total = [a if b is None else a + b for a, b in zip(one, other, strict=True)]
    return (sft_loss + 5.0 * l_cons).detach(), total


def check(model: nn.Module, layers: list[str], x: Tensor, loss_fn: Any) -> None:
    want, gradients = by_hand(model, layers, x, loss_fn)
    before = attributes(model)
    for strategy in ("released", "retained"):
        model.zero_grad()
        with LfURegularizer(model, "weights", layers=layers, alpha=0.5, lam=5.0, strategy=strategy) as reg:
            loss = reg(model, x, loss_fn)
            loss.backward()
        torch.testing.assert_close(loss.detach(), want, rtol=1e-10, atol=0)
        for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-8, atol=1e-12, msg=name)
        assert attributes(model) == before


def attributes(model: nn.Module) -> list[Any]:
    """Which objects the modules hold, also inside of containers."""

    def ids(value: Any) -> Any:
        inside = list(value.values()) if isinstance(value, dict) else value
        return id(value), [ids(v) for v in inside] if isinstance(inside, (list, tuple)) else None

    return [
        (name, ids(value))
        for module in model.modules()
        for name, value in vars(module).items()
        if name[:1] != "_" or "flat" in name
    ]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (nn.LSTM, {}),
        (nn.GRU, {"num_layers": 2}),
        (nn.RNN, {"bidirectional": True}),
        (nn.LSTM, {"proj_size": 4, "hidden_size": 5}),
    ],
    ids=["LSTM", "GRU", "RNN", "LSTM with a projection"],
)
def test_recurrent_layers(kind: Any, options: dict[str, Any]) -> None:
    make = (lambda *a, **k: kind(4, **k)) if "hidden_size" in options else kind
    model = Recurrent(make, **options).double()
    ids = torch.randint(9, (2, 5))
    check(model, ["rnn"], ids, lambda m, b: m(b).square().mean())
    assert all(
        held is getattr(model.rnn, n)
        for held, n in zip(model.rnn._flat_weights, model.rnn._flat_weights_names, strict=True)
    )
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    with torch.no_grad():
        model.rnn.weight_hh_l0.add_(0.1)
        twin.load_state_dict(model.state_dict())
    assert torch.equal(model(ids), twin(ids))


@pytest.mark.parametrize("where", ["list", "nested", "attribute"])
def test_weights_in_a_modules_own_containers(where: str) -> None:
    """copy.deepcopy keeps the identity of a parameter within containers, so the reference has the same structure."""
    model = nn.Sequential(nn.Linear(4, 4), Listed(where), Listed(where)).double()
    check(model, ["1", "2"], torch.randn(3, 4, dtype=torch.float64), lambda m, b: m(b).square().mean())


def test_weights_that_a_parent_holds() -> None:
    check(
        Holder().double(),
        ["blocks.0", "blocks.1"],
        torch.randn(3, 4, dtype=torch.float64),
        lambda m, b: m(b).square().mean(),
    )


def test_everything_is_put_back_after_an_exception() -> None:
    model = Recurrent(nn.LSTM).double()
    before = attributes(model)
    reg = LfURegularizer(model, WeightDeltas(), layers=["rnn"], alpha=0.5)

    def failing(m: nn.Module, a: Any) -> None:
        if reg.perturbation:
            raise KeyError("in the second pass")

    model.rnn.register_forward_pre_hook(failing)
    with pytest.raises(KeyError):
        reg(model, torch.randint(9, (2, 5)), lambda m, b: m(b).square().mean())
    assert attributes(model) == before
    copy.deepcopy(model.rnn)
