"""Run a script of docs/examples/ on this rank, in the process group that is there."""

from __future__ import annotations

import runpy
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from lfu_reg.step.attached_model import is_attached
from tests.support.acts import assert_acts

ROOT = Path(__file__).resolve().parents[2]


def run_example(name: str) -> None:
    """The model is trained, to the same weights on all ranks, at a ratio that acts, and the hooks are gone."""
    from transformers import AutoModelForCausalLM

    with mock.patch.object(dist, "init_process_group"), mock.patch.object(dist, "destroy_process_group"):
        names = runpy.run_path(str(ROOT / "docs" / "examples" / name))
    assert_acts([{"gradient_ratio": float(names["reg"].metrics["gradient_ratio"])}], at_least=1)
    before = dict(AutoModelForCausalLM.from_pretrained(names["name"]).named_parameters())
    for key, parameter in names["model"].named_parameters():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        assert not torch.equal(whole, before[key]), key
        both = [torch.empty_like(whole) for _ in range(2)]
        dist.all_gather(both, whole.detach())
        assert torch.equal(*both)
    assert not is_attached(names["model"])
