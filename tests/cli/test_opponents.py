"""The opponents compute what they are said to."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("peft")

from lfu_reg import LfURegularizer
from lfu_reg.cli import opponents, rivals
from lfu_reg.cli.saved_bytes import SavedBytes
from lfu_reg.cli.subjects import Setting, Subject, make_subject

pytestmark = pytest.mark.filterwarnings("ignore::lfu_reg.LfUWarning")


@pytest.fixture
def subject() -> Subject:
    made = make_subject(Setting(model="tiny", batch=2, tokens=8, tuning="full"))
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_literal_steering_has_the_gradients_of_lfu(subject: Subject) -> None:
    model, batch, loss = subject.model, subject.batch, subject.sft_loss
    opponents.three_forwards(model, batch, loss).backward()
    expected = gradients(model)
    with LfURegularizer(model, "steering") as reg:
        reg(model, batch, loss).backward()
    torch.testing.assert_close(gradients(model), expected, rtol=1e-4, atol=1e-6)


def test_authors_lora_with_lambda_zero_is_sft(subject: Subject) -> None:
    model, batch, loss = subject.model, subject.batch, subject.sft_loss
    loss(model, batch).backward()
    expected = gradients(model)
    opponents.authors_lora(model, batch, loss, lam=0.0).backward()
    torch.testing.assert_close(gradients(model), expected)


def test_authors_steering_turns_and_keeps_lengths(subject: Subject) -> None:
    procedure = opponents.AuthorsSteering(subject.model)
    before = [vector.detach().clone() for vector in procedure.vectors]
    y = torch.randn(2, 3, 32)
    turned = procedure._turn(0, y, y)
    torch.testing.assert_close(turned.norm(dim=-1), y.norm(dim=-1))
    assert not torch.allclose(turned, y)
    procedure(subject.model, subject.batch, subject.sft_loss).backward()
    assert subject.model.training
    assert all(not torch.equal(a, b) for a, b in zip(before, procedure.vectors, strict=True))
    assert len(gradients(subject.model)) == len(list(subject.model.parameters()))


def test_sam_takes_gradients_at_the_moved_weights(subject: Subject) -> None:
    model, batch, loss = subject.model, subject.batch, subject.sft_loss
    start = copy.deepcopy(model.state_dict())
    loss(model, batch).backward()
    g = gradients(model)
    norm = torch.stack([x.norm() for x in g.values()]).norm()
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in moved.named_parameters():
            p += 0.05 * g[name] / norm
    loss(moved, batch).backward()
    rivals.sam_step(model, batch, loss)
    torch.testing.assert_close(gradients(model), gradients(moved))
    torch.testing.assert_close(model.state_dict(), start, rtol=0, atol=0)


def test_sam_puts_the_weights_back_after_an_error(subject: Subject) -> None:
    start, calls = copy.deepcopy(subject.model.state_dict()), []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("stop")
        return subject.sft_loss(model, batch)

    with pytest.raises(RuntimeError, match="stop"):
        rivals.sam_step(subject.model, subject.batch, loss)
    torch.testing.assert_close(subject.model.state_dict(), start, rtol=0, atol=0)


def test_neftune_adds_noise_of_its_size_and_takes_its_hook_off(subject: Subject) -> None:
    model, embeddings = subject.model, subject.model.get_input_embeddings()
    seen: list[Tensor] = []

    def loss(m: nn.Module, batch: Any) -> Tensor:
        handle = embeddings.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
        try:
            return subject.sft_loss(m, batch)
        finally:
            handle.remove()

    rivals.neftune(model, subject.batch, loss, alpha=5.0)
    noise = (seen[0] - embeddings(subject.batch["input_ids"])).abs().max()
    bound = 5.0 / (8 * 32) ** 0.5
    assert 0.9 * bound < noise <= bound * 1.001
    assert not embeddings._forward_hooks


def test_r_drop_without_dropout_is_sft(subject: Subject) -> None:
    expected = subject.sft_loss(subject.model, subject.batch)
    torch.testing.assert_close(rivals.r_drop(subject.model, subject.batch, subject.sft_loss), expected)


def test_saved_bytes_counts_what_is_kept_once() -> None:
    x = torch.randn(1000, requires_grad=True)
    with SavedBytes() as saved:
        y = x.exp()  # keeps its result
        z = y.sin()  # keeps its argument: the same storage
        assert saved.peak == 4000
        del z, y
    assert saved.now == 0
