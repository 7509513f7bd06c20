"""The examples on the gotcha pages run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from lfu_reg.step.attached_model import is_attached
from tests.support.cases import plain_loss, token_batch
from tests.support.plain_models import TinyLM

PAGES = sorted((Path(__file__).resolve().parents[2] / "docs" / "gotchas").glob("*.md"))
_CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize("page", [p for p in PAGES if _CODE.search(p.read_text())], ids=lambda p: p.stem)
@pytest.mark.filterwarnings("ignore::lfu_reg.LfUWarning")
def test_examples_run(page: Path) -> None:
    model: nn.Module = TinyLM().train()
    names = {
        "model": model,
        "loader": [token_batch(seed) for seed in range(2)],
        "sft_loss_fn": plain_loss,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
    }
    for block in _CODE.findall(page.read_text()):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        exec(compile(block, str(page), "exec"), names)
        assert not all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert not is_attached(model)
