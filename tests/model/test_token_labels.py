"""Which tokens count by labels and attention masks of every kind, together and alone."""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lfu_reg import LfURegularizer
from lfu_reg.model.layers import encoder_and_decoder
from lfu_reg.model.tokens import COUNTED_BUT_IGNORED, TokenMasks, ignored_but_counted
from lfu_reg.step.checks import shapes_of_targets
from tests.support.models import LLAMA, T5, TINY

HIDDEN = torch.zeros(2, 4, 3)
ATTENTION = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
Batch = namedtuple("Batch", "inputs targets")


def counted(batch: Any, hidden: Tensor = HIDDEN, axis: int = -1, **options: Any) -> list[Any] | None:
    where = {name: options.pop(name, False) for name in ("encoder", "decoder")}
    mask = TokenMasks(batch, **options).match(hidden, axis, **where)[0]
    return None if mask is None else mask.int().tolist()


MASKS = {
    "0 and 1": ATTENTION,
    "boolean": ATTENTION.bool(),
    "floats of 0 and 1": ATTENTION.half(),
    "additive": torch.zeros(2, 4).masked_fill(ATTENTION == 0, -1e9),
    "additive, smallest float": torch.zeros(2, 4).masked_fill(ATTENTION == 0, torch.finfo(torch.float32).min),
    "additive, infinite": torch.zeros(2, 4, dtype=torch.bfloat16).masked_fill(ATTENTION == 0, float("-inf")),
    "additive integers": (ATTENTION - 1) * 10000,
}


@pytest.mark.parametrize("kind", MASKS)
def test_kinds_of_attention_masks(kind: str) -> None:
    assert counted({"attention_mask": MASKS[kind]}) == ATTENTION.tolist()
    assert counted({"attention_mask": MASKS[kind].T}, HIDDEN.transpose(0, 1)) == ATTENTION.T.tolist()


def test_masks_that_keep_everything_and_nothing() -> None:
    assert counted({"attention_mask": torch.zeros(2, 4)}) is None  # additive, without any padding
    assert counted({"attention_mask": torch.ones(2, 4)}) is None
    assert counted({"attention_mask": torch.zeros(2, 4, dtype=torch.long)}) == [[0] * 4] * 2
    assert counted({"attention_mask": torch.full((2, 4), -1e9)}) == [[0] * 4] * 2


@pytest.mark.parametrize("ignored", [-100, -1, -(2**31)])
@pytest.mark.parametrize("dtype", [torch.long, torch.int32])
def test_labels_below_zero_are_ignored(ignored: int, dtype: torch.dtype) -> None:
    labels = torch.tensor([[ignored, 3, 0, 4], [ignored, ignored, 5, 6]], dtype=dtype)
    assert counted({"labels": labels}) == [[0, 1, 1, 1], [0, 0, 1, 1]]


@pytest.mark.parametrize("index", [0, 5, 255])
@pytest.mark.parametrize("dtype", [torch.long, torch.int16, torch.uint8])
def test_ignore_index(index: int, dtype: torch.dtype) -> None:
    labels = torch.tensor([[index, 3, 9, 156], [index, index, 7, 6]]).to(dtype)
    assert counted({"labels": labels}, ignore_index=index) == [[0, 1, 1, 1], [0, 0, 1, 1]]
    assert counted({"labels": labels}) is None


def test_labels_and_attention_mask_together() -> None:
    labels = torch.tensor([[-100, 3, 3, 3], [3, 3, 3, 3]])
    both = [[0, 1, 1, 0], [1, 1, 1, 1]]
    for mask in MASKS.values():
        assert counted({"labels": labels, "attention_mask": mask}) == both
    # A mask of other tokens (of images, of a longer sequence) leaves the labels alone, and labels of other tokens it.
    assert counted({"labels": labels, "attention_mask": torch.zeros(2, 9)}) == [[0, 1, 1, 1], [1] * 4]
    assert counted({"labels": torch.zeros(2, 9).long(), "attention_mask": ATTENTION}) == ATTENTION.tolist()
    # Virtual tokens in front of both: attended to, but no labels.
    longer = torch.zeros(2, 6, 3)
    prompted = torch.nn.Module()
    prompted._is_prompt_learning, prompted.active_peft_config = True, SimpleNamespace(num_virtual_tokens=2)  # type: ignore[assignment]
    together = counted({"labels": labels, "attention_mask": ATTENTION}, longer, model=prompted)
    assert together == [[0, 0, *row] for row in both]


def test_what_the_user_says_is_not_combined_with_anything() -> None:
    given = torch.tensor([[0, 0, 0, 1], [1, 0, 0, 0]])
    batch = {"labels": torch.full((2, 4), -100), "attention_mask": ATTENTION}
    assert counted(batch, token_mask=given) == given.tolist()


def test_the_decoder_has_its_own_padding() -> None:
    labels = torch.tensor([[3, 3, -100, -100], [3, 3, 3, 3]])
    batch = {"labels": labels, "attention_mask": torch.tensor([[0, 1, 1, 1]] * 2)}
    assert counted(batch, decoder=True) == [[1, 1, 0, 0], [1] * 4]
    assert counted(batch, encoder=True) == [[0, 1, 1, 1]] * 2
    batch["decoder_attention_mask"] = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 0]])
    assert counted(batch, decoder=True) == counted(batch) == [[1, 0, 0, 0], [1, 1, 1, 0]]


def test_which_layers_are_the_encoders() -> None:
    t5, names = T5.make(), ["encoder.block.0", "decoder.block.1", "shared"]
    assert encoder_and_decoder(t5, names) == ({"encoder.block.0"}, {"decoder.block.1"})
    assert encoder_and_decoder(t5, names[:1]) == ({"encoder.block.0"}, set()), "also if no decoder layer is chosen"
    assert encoder_and_decoder(LLAMA.make(), ["model.layers.0"]) == (set(), set())


@pytest.mark.parametrize("wrap", [tuple, list, lambda pair: Batch(*pair), lambda pair: (*pair, "more")])
def test_inputs_and_targets(wrap: Any) -> None:
    targets = torch.tensor([[-1, 3, 3, -1], [-1, -1, 3, 3]])
    assert counted(wrap((torch.zeros(2, 4).long(), targets))) == [[0, 1, 1, 0], [0, 0, 1, 1]]
    assert counted(wrap(({"ids": None}, targets.clamp(min=0))), ignore_index=0) == [[0, 1, 1, 0], [0, 0, 1, 1]]


@pytest.mark.parametrize("labels", [(), (torch.tensor([[-100, 3, 3, 3]] * 2),)])
def test_a_mask_in_the_second_place_is_no_match(labels: tuple[Tensor, ...]) -> None:
    """It leaves nothing out as labels, so whoever looks for a mask without effect still looks."""
    tokens = TokenMasks((torch.zeros(2, 4).long(), ATTENTION, *labels))
    assert tokens.match(HIDDEN, -1, encoder=False) == (None, None)
    assert not tokens.matched
    tokens = TokenMasks((torch.zeros(2, 4).long(), ATTENTION - 1))
    assert tokens.match(HIDDEN, -1, encoder=False)[0] is not None
    assert tokens.matched


NO_TOKEN_LABELS = {
    "class numbers": torch.tensor([0, 1]),
    "a sign": torch.tensor([-1, 1]),
    "a column": torch.tensor([[0], [1]]),
    "floats": torch.tensor([[-1.0, 0.5, 0.0, 1.0]] * 2),
    "boolean": torch.zeros(2, 4, dtype=torch.bool),
    "other tokens": torch.full((2, 7), -100),
}


@pytest.mark.parametrize("kind", NO_TOKEN_LABELS)
@pytest.mark.parametrize("hidden", [HIDDEN, torch.zeros(2, 2, 3), torch.zeros(2, 3)], ids=lambda h: str(list(h.shape)))
def test_labels_of_whole_samples_are_no_token_labels(kind: str, hidden: Tensor) -> None:
    labels = NO_TOKEN_LABELS[kind]
    assert counted({"labels": labels}, hidden) is None
    assert counted((torch.zeros(2, 4), labels), hidden) is None
    if hidden is HIDDEN:
        assert counted({"labels": labels, "attention_mask": ATTENTION}) == ATTENTION.tolist()


def test_samples_without_a_label_do_not_count() -> None:
    """Nodes of a graph, or packed tokens: hidden states [positions, hidden]."""
    assert counted({"labels": torch.tensor([-100, 1])}, torch.zeros(2, 3)) == [0, 1]


@pytest.mark.parametrize("convert", [lambda b: (b["input_ids"], b["labels"]), lambda b: [b["input_ids"], b["labels"]]])
def test_padding_in_the_targets_of_a_pair_changes_nothing(convert: Any) -> None:
    def loss(model: Any, batch: Any) -> Tensor:
        return TINY.loss(model, {"input_ids": batch[0], "labels": batch[1]})

    found = []
    for extra in (0, 3):
        batch = {
            "input_ids": torch.nn.functional.pad(TINY.batch()["input_ids"], (0, extra)),
            "labels": torch.nn.functional.pad(TINY.batch()["labels"], (0, extra), value=-100),
        }
        model = TINY.make()
        model.norm = torch.nn.Identity()  # which mixes tokens
        with LfURegularizer(model, "steering", alpha=0.05, lam=0.7) as reg:
            reg(model, convert(batch), loss)
            found.append(float(reg.metrics["consistency_loss"]))
    assert found[0] == pytest.approx(found[1], rel=1e-10)
    assert found[0] > 0


def test_positions_that_count_although_the_loss_ignores_them() -> None:
    has_gradient = torch.tensor([[False, True, True, False], [True, False, False, False]])
    # A label at t is predicted from t - 1 where it is shifted, so the position after a gradient is no surprise.
    assert ignored_but_counted(has_gradient) == (3, 8)
    message = COUNTED_BUT_IGNORED.format(ignored=3, counted=8)
    for part in ("3 of 8", "ignore_index", "token_mask"):
        assert part in message


def test_what_the_loss_ignores_is_seen_in_its_gradient() -> None:
    model, batch = TINY.make(), TINY.batch()
    model.norm = torch.nn.Identity()
    states: list[Tensor] = []
    model.blocks[-1].register_forward_hook(lambda m, a, out: states.append(out))
    (gradient,) = torch.autograd.grad(TINY.loss(model, batch), states)
    has_gradient = gradient.ne(0).any(-1)
    assert ignored_but_counted(has_gradient)[0] > 0
    assert ignored_but_counted(has_gradient | (batch["labels"] == -100))[0] == 0


def test_whose_targets_token_dimensions_may_be() -> None:
    whole, mask = torch.zeros(2, 5).long(), torch.zeros(2, 5)
    assert shapes_of_targets([whole, whole]) >= {(2, 5)}
    assert shapes_of_targets([whole, mask]) == {(1, 5), (2, 4)}, "one tensor, which the loss shifts"
    assert shapes_of_targets([torch.zeros(5).long(), mask]) == set()
