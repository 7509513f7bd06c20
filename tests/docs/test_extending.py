"""The examples of docs/extending.md run as they stand, in at most 30 lines, and its messages are those one gets."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lfu_reg import LfURegularizer
from tests.docs.examples import blocks
from tests.support.cases import plain_loss, token_batch
from tests.support.plain_models import TinyLM

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extending.md"
AUXILIARY, DISTANCE, LOOP = blocks(PAGE.read_text())


def run(example: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model = TinyLM().train()
    names: dict[str, Any] = {
        "__name__": "example",
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loader": [token_batch(seed) for seed in range(4)],
        "sft_loss_fn": plain_loss,
    }
    exec(compile(example, str(PAGE), "exec"), names)
    return names


@pytest.mark.parametrize("example", [AUXILIARY, DISTANCE, LOOP], ids=["auxiliary", "distance", "loop"])
def test_an_example_has_at_most_30_lines(example: str) -> None:
    assert len(example.strip("\n").split("\n")) <= 30


@pytest.mark.parametrize("example", [AUXILIARY, DISTANCE], ids=["auxiliary", "distance"])
def test_auxiliary_and_distance(example: str) -> None:
    reg = run(example)["reg"]
    assert float(reg.metrics["consistency_loss"]) > 0


def test_auxiliary_by_hand() -> None:
    """h' = h * (1 + alpha g / ||g||), with g from hooks of the test's own."""
    names = run(AUXILIARY)
    model, batch = names["model"], names["loader"][0]
    with LfURegularizer(model, names["ChannelGains"](), alpha=0.1) as reg:
        reg(model, batch, plain_loss)
        got = reg.perturbation
    gains = {name: torch.zeros(8, requires_grad=True) for name in got}
    for name, c in gains.items():
        model.get_submodule(name).register_forward_hook(lambda m, a, y, c=c: y * (1 + c))
    g = torch.autograd.grad(plain_loss(model, batch), list(gains.values()))
    norm = torch.cat(g).norm()
    for delta, part in zip(got.values(), g, strict=True):
        torch.testing.assert_close(delta, 0.1 * part / norm, rtol=1e-4, atol=1e-6)


def test_loop() -> None:
    names = run(LOOP)
    before = [parameter.detach().clone() for parameter in names["model"].parameters()]
    settings = {"accumulate": 2, "auxiliary": "steering", "seed": 1}
    loop = names["Loop"](names["model"], names["optimizer"], plain_loss, **settings)
    loop.train(names["loader"])
    assert not all(torch.equal(a, b) for a, b in zip(before, names["model"].parameters(), strict=True))
    assert loop.checkpoint()["lfu"]["step"] == 4
    got = loop.evaluate(names["loader"])
    loop.close()
    with torch.no_grad():
        assert torch.equal(got, torch.stack([plain_loss(names["model"], b) for b in names["loader"]]).mean())


def without_default(auxiliary: Any) -> Any:
    return type("ChannelGains", (type(auxiliary),), {"default_alpha": None})()


def changed(method: str, function: Any) -> Any:
    """`auxiliary` or distance with another method."""
    return lambda given: type(type(given).__name__, (type(given),), {method: function})()


def written(self: Any, components: tuple[Tensor, ...], call: Any) -> Tensor:
    return call.y.mul_(1 + components[0])


def huber(h: Tensor, h_prime: Tensor) -> Tensor:
    return torch.nn.functional.huber_loss(h_prime, h)


MISTAKES = (
    changed("start", lambda self, call, generator: call.y.new_zeros(8)),
    changed("start", lambda self, call, generator: (torch.zeros(8, device="meta"),)),
    changed("apply", lambda self, cs, call: call.y * (1 + cs[0].double())),
    changed("apply", written),
    changed("apply", lambda self, cs, call: None),
    changed("apply", lambda self, cs, call: call.y * (1 + cs[0].detach())),
    changed("gradient_rule", lambda self, cs, call: lambda g: (g * call.y).sum((0, 1))),
    changed("sites", lambda self, model, layers: list(layers.values())),
    without_default,
    changed("layer", lambda self, h, p, reduction: (p - h).square().mean(-1)),
    changed("layer", lambda self, h, p, reduction: huber(h, p).item()),
    changed("layer", lambda self, h, p, reduction: huber(h, p.detach())),
)
ROWS = re.findall(r"^\| .*? \| (\w.*) \|$", PAGE.read_text().split("## Common mistakes")[1].split("|---|---|")[1], re.M)


def test_every_row_has_its_mistake() -> None:
    assert len(ROWS) == len(MISTAKES)


@pytest.mark.parametrize(("mistake", "message"), zip(MISTAKES, ROWS, strict=False), ids=[row[:40] for row in ROWS])
def test_the_messages_are_those_one_gets(mistake: Any, message: str) -> None:
    expected = ".*".join(re.escape(part.strip()) for part in message.split("..."))
    auxiliary, distance = run(AUXILIARY)["ChannelGains"](), run(DISTANCE)["Huber"]()
    model = TinyLM().train()
    given = {"distance": mistake(distance)} if message.startswith("Huber") else {"auxiliary": mistake(auxiliary)}
    given |= {"lam": 1.0} if mistake is without_default else {}
    with pytest.raises((TypeError, ValueError)) as caught:
        LfURegularizer(model, **given)(model, token_batch(0), plain_loss)
    assert re.match(expected, str(caught.value)), caught.value
