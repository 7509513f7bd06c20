"""Counts without running are those of a run."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("typer")

from lfu_reg.cli.flops import count, flop_counter
from lfu_reg.cli.methods import blocks_alone, make_method
from lfu_reg.cli.recommend import options_within
from lfu_reg.cli.saved_bytes import SavedBytes
from lfu_reg.cli.workloads import Setting, make_workload
from tests.support.architectures import IS_OLDER

pytestmark = pytest.mark.filterwarnings("ignore::lfu_reg.LfUWarning")
SETTING = Setting(model="tiny", batch=2, tokens=8)
counts_it = pytest.mark.skipif(IS_OLDER, reason="an older transformers looks at values of masks: nothing is counted")


@counts_it
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_operations_and_bytes_of_a_run(tuning: str) -> None:
    setting = Setting(model="tiny", batch=2, tokens=8, tuning=tuning)
    counts, workload = count(setting), make_workload(setting)
    weights = list(workload.model.parameters())
    assert counts.parameters == sum(p.numel() for p in weights)
    assert counts.gradient_bytes == sum(p.nbytes for p in weights if p.requires_grad)
    for key in ("sft", "steering", "weights"):
        run = make_method(key, workload).run
        for _ in range(2):  # the first step looks at a replay, too
            run()
        with flop_counter() as flops, SavedBytes() as saved:
            run()
        assert counts.steps[key].flops == flops.get_total_flops(), key
        # The true forward knows that no token is masked, and keeps no mask for its attention.
        assert counts.steps[key].saved_bytes == pytest.approx(saved.peak, rel=0.1), key


@counts_it
def test_lfu_takes_the_blocks_once_more() -> None:
    steps = count(SETTING).steps
    assert steps["weights"].flops == steps["sft"].flops + steps["blocks"].flops
    # Steering runs the first of two blocks once, whose input needs no gradient.
    added = steps["steering"].flops - steps["sft"].flops
    assert steps["blocks"].flops / 2 < added < 0.6 * steps["blocks"].flops
    assert steps["sft"].flops > steps["blocks"].flops


@counts_it
def test_deep_models_are_counted_by_two_shallow_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(model="small", batch=1, tokens=8, layers=6)
    extrapolated = count(setting, ("sft", "steering"))
    monkeypatch.setattr("lfu_reg.cli.flops.DEEP", 6)
    assert count(setting, ("sft", "steering")) == extrapolated


def test_the_model_and_the_generators_are_left_alone() -> None:
    uniform, default = torch.Tensor.uniform_, torch.get_default_dtype()
    count(Setting(model="tiny", batch=2, tokens=8, dtype="bfloat16"))
    assert torch.Tensor.uniform_ is uniform
    assert torch.get_default_dtype() is default
    assert torch.rand(2).device.type == "cpu"


def test_blocks_alone_leave_after_the_last_block() -> None:
    workload = make_workload(SETTING)
    left_out = []
    method = blocks_alone(workload)
    head = method.model.get_output_embeddings()  # type: ignore[operator]
    head.register_forward_hook(lambda *call: left_out.append(call))
    method.run()
    assert not left_out


def test_advice_prefers_the_exact_step() -> None:
    (option,) = options_within(2.0, "lora", 1.9, 0.85, 8)
    assert option.label == "LfURegularizer(model, 'lora')"


def test_advice_changes_as_little_as_needed() -> None:
    samples, late, early, steps = options_within(1.5, "lora", 1.9, 0.85, 8)
    assert samples.options == {"batch_fraction": 0.5}  # three quarters would take 1.69
    assert samples.ratio == pytest.approx(1.9 - 0.5 * 0.85)
    assert late.options == {"layers": "late"}
    assert early.options == {"layers": "early"}
    assert steps.options == {"every": 2}
    assert steps.ratio == pytest.approx(1.45)


def test_advice_knows_that_a_sample_is_the_least() -> None:
    kinds = [set(option.options) for option in options_within(1.3, "lora", 1.9, 0.85, 2)]
    assert {"batch_fraction"} not in kinds
