"""A user's own distance: every wrong return is an error at once that names it and says what it must return."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lfu_reg import Distance, LfURegularizer, PerLayerDistance
from lfu_reg.distances import make_distance
from lfu_reg.distances.base import measure
from tests.support.models import TINY
from tests.support.refusals import refuses, refuses_step


def absolute(clean: Tensor, perturbed: Tensor) -> Tensor:
    return (perturbed - clean).abs().mean()


WRONG: dict[str, tuple[Any, tuple[str, ...]]] = {
    "one value per token": (
        lambda h, p: (p - h).abs().mean(-1),
        ("tensor of shape [12]", "scalar", "mean over tokens"),
    ),
    "one value": (lambda h, p: absolute(h, p)[None], ("tensor of shape [1]", "scalar")),
    "a float": (lambda h, p: absolute(h, p).item(), ("a float", "scalar tensor")),
    "None": (lambda h, p: None, ("returned None", "scalar tensor")),
    "integers": (lambda h, p: absolute(h, p).long(), ("int64", "floating-point")),
    "no gradient": (lambda h, p: absolute(h, p.detach()), ("without a gradient", "detach()", "no_grad()")),
}


def as_function(returned: Any) -> tuple[Any, str]:
    def mine(clean: Tensor, perturbed: Tensor) -> Any:
        return returned(clean, perturbed)

    return mine, "The distance function mine"


def as_layer(returned: Any) -> tuple[Any, str]:
    mine = type("Mine", (PerLayerDistance,), {"layer": lambda self, h, p, reduction: returned(h, p)})
    return mine(), "Mine.layer"


@pytest.mark.parametrize("strategy", ["released", "retained"])
@pytest.mark.parametrize("way", [as_function, as_layer])
@pytest.mark.parametrize("kind", WRONG)
def test_one_layer(kind: str, way: Any, strategy: str) -> None:
    returned, parts = WRONG[kind]
    distance, name = way(returned)
    model = TINY.make()
    reg = LfURegularizer(model, "steering", distance=distance, strategy=strategy, token_mask=lambda b: b["labels"] >= 0)
    refuses_step((name, *parts), model=model, reg=reg)


TOGETHER: dict[str, tuple[Any, tuple[str, ...]]] = {
    "the loss alone": (lambda h, p: absolute(h[0], p[0]), ("a pair", "distances per layer")),
    "three things": (lambda h, p: (absolute(h[0], p[0]), torch.zeros(3), None), ("a pair",)),
    "a vector": (lambda h, p: (torch.stack([p[0].mean()] * 3), torch.zeros(3)), ("as the loss", "scalar")),
    "a list of distances": (lambda h, p: (absolute(h[0], p[0]), [0.0] * 3), ("a list", "shape [3]")),
    "one distance for all": (
        lambda h, p: (absolute(h[0], p[0]), torch.zeros(())),
        ("distances per layer", "shape [3]"),
    ),
    "no gradient": (lambda h, p: (absolute(h[0], p[0]).detach(), torch.zeros(3)), ("without a gradient",)),
}


def all_layers(returned: Any) -> Any:
    return type("Mine", (Distance,), {"__call__": lambda self, h, p, index, reduction: returned(h, p)})()


@pytest.mark.parametrize("kind", TOGETHER)
def test_all_layers(kind: str) -> None:
    returned, parts = TOGETHER[kind]
    model = TINY.make()
    reg = LfURegularizer(model, "steering", distance=all_layers(returned))
    refuses_step(("Mine.__call__", *parts), model=model, reg=reg)


def test_what_is_measured() -> None:
    mine = type("Mine", (PerLayerDistance,), {"layer": lambda *_: None, "measures": "hidden"})
    refuses(TINY.make(), ("Mine.measures='hidden'", "'hidden_states'", "'logits'"), "steering", distance=mine())


def test_states_without_gradients_may_have_a_distance_without() -> None:
    h = torch.ones(2, 3)
    loss, per_layer = measure(make_distance(absolute), [h], [h + 1], [None], "mean")
    assert (float(loss), per_layer.tolist()) == (1.0, [1.0])


def test_checks_read_no_value() -> None:
    """Tensors on the meta device have none, so whoever reads one, and on a GPU would wait for it, fails here."""
    h, h_prime = torch.zeros(2, 3, 8, device="meta"), torch.zeros(2, 3, 8, device="meta").requires_grad_()
    loss, per_layer = measure(make_distance(absolute), [h], [h_prime], [None], "mean")
    assert loss.requires_grad
    assert per_layer.device.type == "meta"
