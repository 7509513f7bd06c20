"""What outlives a step: how long to wait after a loss that did not repeat, and which calls are one step."""

from __future__ import annotations

import gc
import itertools

import torch
from torch import nn
from torch.optim import optimizer

from lfu_reg.step.progress import LONGEST_WAIT, Progress, SameStep
from lfu_reg.step.settings import Settings

SETTINGS = Settings(alpha=0.1, lam=1.0)


def test_the_wait_is_bounded() -> None:
    progress, tried = Progress(0, SETTINGS), []
    for progress.step in range(4 * LONGEST_WAIT):
        if not progress.waits():
            tried.append(progress.step)
            progress.did_repeat(False)
    gaps = [b - a for a, b in itertools.pairwise(tried)]
    assert gaps[:3] == [2, 4, 8]
    assert max(gaps) == LONGEST_WAIT + 1
    assert gaps[-1] == max(gaps)


def test_the_same_batch_and_weights_draw_the_same() -> None:
    model, steps = nn.Linear(2, 2), SameStep()
    weights = list(model.parameters())
    batch, other = {"x": torch.zeros(2)}, {"x": torch.zeros(2)}
    assert not steps.repeats(weights, batch)
    assert steps.repeats(weights, batch)
    assert not steps.repeats(weights, other)
    assert steps.repeats(weights, other)
    with torch.no_grad():
        model.weight.add_(1)
    assert not steps.repeats(weights, other)
    assert not steps.repeats(list(nn.Linear(2, 2).parameters()), other)
    assert not steps.repeats(weights, {"x": 1})
    assert not steps.repeats(weights, {"x": 1}), "nothing tells whether it is the same"


def test_nothing_counts_for_one_that_is_gone() -> None:
    tables = optimizer._global_optimizer_pre_hooks, optimizer._global_optimizer_post_hooks
    gc.collect()
    before = [len(table) for table in tables]
    steps = SameStep()
    assert [len(table) for table in tables] == [n + 1 for n in before]
    del steps
    assert [len(table) for table in tables] == before


def test_a_step_that_is_repeated_draws_the_same() -> None:
    """Also where it is counted as a step of its own, outside of an optimizer's closure."""
    model, batch, progress, drawn = nn.Linear(2, 2), {"x": torch.zeros(2)}, Progress(0, SETTINGS), []
    for given in (batch, batch, {"x": torch.zeros(2)}):
        progress.step = progress.begin(list(model.parameters()), given)
        drawn.append(progress.samples(1000, 0.5))
        progress.step += 1
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert progress.step == 3
