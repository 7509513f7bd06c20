"""The options of LfU that the evidence asks about, against the step written out in three forwards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from methods import METHODS
from methods.lam_control import MEASURING, RatioToSFT
from methods.wrong_answers import wrong_answers
from torch import Tensor, nn

from tests.benchmarks.test_methods import Batch, batch, gradients, loss_fn, make, same
from tests.support.architectures import VOCAB
from tests.support.cases import token_batch

ALPHA, LAM = 0.05, 30.0
OTHER: Batch = token_batch(11, vocab=VOCAB)
TEXT: Batch = token_batch(7, vocab=VOCAB, shape=(2, 5), labels=False)


def states(model: Any, data: Batch, vectors: list[Tensor], counted: Tensor) -> tuple[list[Tensor], Any]:
    """Every block's output with its vector added at the counted positions, and the model's output."""
    seen: list[Tensor] = []

    def steer(number: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            plain = isinstance(output, Tensor)
            h = (output if plain else output[0]) + counted[..., None] * vectors[number]
            seen.append(h)
            return h if plain else (h, *output[1:])

        return hook

    layers = model.base_model.model.model.layers
    handles = [layer.register_forward_hook(steer(i)) for i, layer in enumerate(layers)]
    output = model(**data)
    for handle in handles:
        handle.remove()
    return seen, output


def literal(
    model: Any,
    data: Batch,
    count: Callable[[Batch], Tensor],
    *,
    ascent: Batch | None = None,
    sign: float = 1.0,
    text: Batch | None = None,
) -> Tensor:
    """l_SFT on the batch + lam * l_cons on `text`, after sign * ascent of l_SFT on `ascent`, by steering vectors."""
    ascent, text = data if ascent is None else ascent, data if text is None else text
    width, layers = model.config.hidden_size, model.config.num_hidden_layers
    zero = [torch.zeros(width, dtype=torch.float64, requires_grad=True) for _ in range(layers)]
    _, output = states(model, ascent, zero, count(ascent))
    g = torch.autograd.grad(sign * output.loss, zero)
    norm = torch.cat(g).norm()
    vectors = [ALPHA * x / norm for x in g]
    counted = count(text)
    unlabelled = {name: value for name, value in text.items() if name != "labels"}
    clean, _ = states(model, unlabelled, [z.detach() for z in zero], counted)
    moved, _ = states(model, unlabelled, vectors, counted)
    chosen = counted.bool()
    terms = [((m[chosen] - c[chosen].detach()) ** 2).mean() for m, c in zip(moved, clean, strict=True)]
    return loss_fn(model, data) + LAM * sum(terms) / layers


def response(data: Batch) -> Tensor:
    return (data["labels"] != -100).double() if "labels" in data else data["attention_mask"].double()


def shifted(data: Batch) -> Tensor:
    counted = torch.zeros(data["labels"].shape, dtype=torch.float64)
    for b in range(counted.shape[0]):
        for t in range(counted.shape[1] - 1):
            counted[b, t] = float(data["labels"][b, t + 1] != -100)
    return counted


def everything(data: Batch) -> Tensor:
    return data["attention_mask"].double()


def call(model: nn.Module, before: Batch | None = None, **options: Any) -> Tensor:
    """The second call of the method if there is a batch `before`, else the first."""
    method = METHODS["lfu"](model, flavour="steering", alpha=ALPHA, lam=LAM, **options)
    if before is not None:
        method(model, before, loss_fn)
    loss = method(model, batch(), loss_fn)
    method.finish()
    return loss


CASES: dict[str, tuple[dict[str, Any], Callable[[Any], Tensor]]] = {
    "same": ({}, lambda m: literal(m, batch(), response)),
    "other": ({"ascent_from": "other", "before": OTHER}, lambda m: literal(m, batch(), response, ascent=OTHER)),
    "undesirable": (
        {"ascent_from": "undesirable"},
        lambda m: literal(m, batch(), response, ascent=dict(wrong_answers(batch())), sign=-1.0),
    ),
    "shifted": ({"mask": "shifted"}, lambda m: literal(m, batch(), shifted)),
    "all tokens": ({"mask": "all"}, lambda m: literal(m, batch(), everything)),
    "elsewhere": ({"elsewhere": [TEXT]}, lambda m: literal(m, batch(), response, text=TEXT)),
    "elsewhere, undesirable": (
        {"elsewhere": [TEXT], "ascent_from": "undesirable"},
        lambda m: literal(m, batch(), response, ascent=dict(wrong_answers(batch())), sign=-1.0, text=TEXT),
    ),
}


@pytest.mark.parametrize("case", list(CASES))
def test_options_against_the_literal_step(case: str) -> None:
    options, reference = CASES[case]
    options = {k: iter(copy.deepcopy(v)) if k == "elsewhere" else v for k, v in options.items()}
    model = make()
    got, want = call(model, **options), reference(model)
    # transformers computes the loss in float32
    assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-6)
    same(gradients(got, model), gradients(want, model), 1e-4, 1e-7)


def test_the_options_differ() -> None:
    model = make()
    values = [float(reference(model).detach()) for _, reference in CASES.values()]
    assert len({round(v, 5) for v in values}) == len(values)


def test_other_takes_its_own_batch_at_first() -> None:
    model = make()
    assert float(call(model, ascent_from="other").detach()) == float(call(model).detach())


def test_wrong_answers() -> None:
    # Prompts of 1 and 2 tokens; the first and the third response are the same, so the first skips to the second's.
    data = {
        "input_ids": torch.tensor([[5, 7, 8, 0], [5, 6, 9, 0], [4, 7, 8, 0]]),
        "labels": torch.tensor([[-100, 7, 8, -100], [-100, -100, 9, -100], [-100, 7, 8, -100]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0]]),
    }
    found = wrong_answers(data)
    assert found["input_ids"].tolist() == [[5, 9, 0, 0], [5, 6, 7, 8], [4, 9, 0, 0]]
    assert found["labels"].tolist() == [[-100, 9, -100, -100], [-100, -100, 7, 8], [-100, 9, -100, -100]]
    assert found["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]
    with pytest.raises(ValueError, match="responses of the batch are the same"):
        wrong_answers({name: value[::2] for name, value in data.items()})


def test_ratio_holds_the_weighted_term_to_a_share_of_the_sft_loss() -> None:
    control = RatioToSFT(0.1, 5.0)
    assert control(0) == MEASURING
    control.observe(torch.tensor(2.0), torch.tensor(0.4))
    assert control(1) == pytest.approx(0.1 * 2.0 / 0.4)
    control.observe(torch.tensor(2.0), torch.tensor(0.001))
    assert control(2) == 5.0  # the bound
    control.observe(torch.tensor(0.0), torch.tensor(0.001))
    assert control(3) == MEASURING
    control.observe(torch.tensor(0.02), None)  # a step that `every` left out
    assert control(4) == pytest.approx(0.1 * 0.02 / 0.001)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_ratio_in_the_method(elsewhere: bool) -> None:
    model = make()
    more = {"elsewhere": iter([TEXT] * 3)} if elsewhere else {}
    method = METHODS["lfu"](model, flavour="steering", lam=1e6, alpha=ALPHA, ratio=0.2, **more)
    for _ in range(3):  # the model stays as it is, so the ratio of the step before is that of this one
        loss = float(method(model, batch(), loss_fn).detach())
    plain = float(loss_fn(model, batch()).detach())
    assert method.reg.metrics["lam"] < 1e6
    assert loss - plain == pytest.approx(0.2 * plain, rel=1e-4)
    method.finish()


def test_refusals() -> None:
    with pytest.raises(ValueError, match="give one of them"):
        METHODS["lfu"](make(), lam=1.0, ratio=0.1, anneal_steps=3)
    with pytest.raises(ValueError, match="'undesirable'"):
        METHODS["lfu"](make(), ascent_from="wrong")
    with pytest.raises(ValueError, match="above 0"):
        METHODS["lfu"](make(), lam=1.0, ratio=0.0)
