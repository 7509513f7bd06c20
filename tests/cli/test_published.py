"""The published procedures compute what they are said to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("peft")

from lfu_reg import LfURegularizer
from lfu_reg.cli.published import authors_lora, three_forwards
from lfu_reg.cli.saved_bytes import SavedBytes
from lfu_reg.cli.workloads import Setting, Workload, make_workload

pytestmark = pytest.mark.filterwarnings("ignore::lfu_reg.LfUWarning")


@pytest.fixture
def workload() -> Workload:
    made = make_workload(Setting(model="tiny", batch=2, tokens=8, tuning="full"))
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_literal_steering_has_the_gradients_of_lfu(workload: Workload) -> None:
    model, batch, loss = workload.model, workload.batch, workload.sft_loss
    three_forwards(model, batch, loss).backward()
    expected = gradients(model)
    with LfURegularizer.paper(model, "steering") as reg:
        reg(model, batch, loss).backward()
    torch.testing.assert_close(gradients(model), expected, rtol=1e-4, atol=1e-6)


def test_authors_lora_with_lambda_zero_is_sft(workload: Workload) -> None:
    model, batch, loss = workload.model, workload.batch, workload.sft_loss
    loss(model, batch).backward()
    expected = gradients(model)
    authors_lora(model, batch, loss, lam=0.0).backward()
    torch.testing.assert_close(gradients(model), expected)


def test_saved_bytes_counts_what_is_kept_once() -> None:
    x = torch.randn(1000, requires_grad=True)
    with SavedBytes() as saved:
        y = x.exp()  # keeps its result
        z = y.sin()  # keeps its argument: the same storage
        assert saved.peak == 4000
        del z, y
    assert saved.now == 0
