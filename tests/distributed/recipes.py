"""Run the code blocks of a page of docs/recipes/ on this rank."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lfu_reg.step.attached_model import is_attached
from tests.distributed.reference import parameters_of
from tests.support.models import TINY

ROOT = Path(__file__).resolve().parents[2]


def run_recipe(page: str) -> None:
    """The model is trained, to the same weights on all ranks, and the hooks are gone."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "recipes" / page).read_text(), re.DOTALL)
    assert blocks
    model: Any = TINY.make()
    before = parameters_of(model)
    names = {
        "model": model,
        "loader": [TINY.batch(10 * number + dist.get_rank()) for number in range(4)],
        "sft_loss_fn": TINY.loss,
    }
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    after = parameters_of(model)
    assert not all(torch.equal(after[name], before[name]) for name in before)
    for parameter in after.values():
        both = [torch.empty_like(parameter) for _ in range(2)]
        dist.all_gather(both, parameter)
        assert torch.equal(*both)
    assert not is_attached(model)
