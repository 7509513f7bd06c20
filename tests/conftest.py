"""Fixtures of the whole suite: fixed seeds, one thread, and a warnings policy."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "suite",
    deadline=None,
    derandomize=True,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """Every test starts from the same random state and leaves the threads alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if (utilities := sys.modules.get("torch._dynamo.utils")) is not None:
        utilities.counters.clear()  # hooks stay on a model where anything was compiled
    yield
    torch.set_num_threads(threads)


def pytest_configure(config: pytest.Config) -> None:
    """The library's own warnings are errors unless a test expects them; other packages' deprecations are not."""
    for policy in (
        "ignore::DeprecationWarning",
        "ignore::FutureWarning",
        "error::lfu_reg.LfUWarning",
        # Exactness is tested at alphas and lambdas that nobody would train with.
        "ignore:LfU (has no effect. the gradient|outweighs|measures rounding):lfu_reg.LfUWarning",
    ):
        config.addinivalue_line("filterwarnings", policy)
