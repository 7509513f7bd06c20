"""The same checks as the interpreter's, on a GPU."""

from __future__ import annotations

import warnings
from importlib.util import find_spec

import pytest
import torch

from lfu_reg.distances.kernels import trial
from lfu_reg.distances.kernels.entry import mse_over_layers
from tests.distances.kernels.checks import CHECKS
from tests.distances.kernels.reference import make

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
]


@pytest.mark.parametrize("name", CHECKS)
def test_on_gpu(name: str) -> None:
    CHECKS[name]("cuda:0", "triton")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_trial_is_passed(dtype: torch.dtype) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for index in (None, torch.tensor([0, 2], device="cuda")):
            mse_over_layers(*make([(2, 3, 64)], dtype, device="cuda"), index)
    assert any(case.dtypes == (dtype, dtype) for case in trial._verdicts)


def test_no_synchronisation() -> None:
    """Neither pass waits for the device, index or not."""
    index = torch.arange(3, 40, device="cuda")
    clean, perturbed = make([(8, 16, 256)] * 4, torch.bfloat16, device="cuda")
    mse_over_layers(clean, perturbed, index)  # the trial does wait
    for _ in range(2):  # the first round compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss, _ = mse_over_layers(clean, perturbed, index)
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_fallback_does_not_wait_either() -> None:
    index = torch.arange(3, 40, device="cuda")
    clean, perturbed = make([(8, 16, 256)] * 4, torch.bfloat16, device="cuda")
    mse_over_layers(clean, perturbed, index, impl="torch")[0].backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        mse_over_layers(clean, perturbed, index, impl="torch")[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_beyond_the_gradients() -> None:
    """Less than 1 MB besides the gradients themselves."""
    clean, perturbed = make([(4, 512, 1024)] * 8, torch.bfloat16, device="cuda")
    owned = [h.detach() for h in clean]
    torch.autograd.grad(mse_over_layers(owned, perturbed, None)[0], perturbed)  # compiles
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = torch.autograd.grad(mse_over_layers(owned, perturbed, None)[0], perturbed)
    extra = torch.cuda.max_memory_allocated() - before
    assert extra - sum(g.numel() * g.element_size() for g in found) < 1 << 20
