"""The authors' procedures among those whose cost is measured."""

from __future__ import annotations

from itertools import repeat

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

import torch
from paper.published_steering import PublishedSteering
from paper.states import names_of
from step import authors
from step.others import OTHERS

from tests.support.architectures import VOCAB, llama
from tests.support.cases import causal_loss, seeded, token_batch


def test_the_steering_row_is_the_published_procedure() -> None:
    model, batch = seeded(llama).double(), token_batch(2, vocab=VOCAB)
    row = OTHERS["authors-steering"].make(model)
    procedure = PublishedSteering(model, repeat(batch), names_of(model, "hidden-states"))
    for _ in range(2):  # the vectors move alike as well
        found, expected = (method(model, batch, causal_loss).detach() for method in (row, procedure))
        assert torch.equal(found, expected)
        assert found > causal_loss(model, batch)


def test_the_section_has_the_paper_s_ratios() -> None:
    said = authors.about("## small\n").replace("\n", " ")
    assert "2.99 times SFT's time for LoRA and 1.68 for steering" in said
    assert said.endswith(" ### small ")
