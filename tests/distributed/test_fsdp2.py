"""FSDP2: each check of `checks_fsdp2.py` on two processes."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.launch import Results, launch, names_of

CHECKS = "tests.distributed.checks_fsdp2"
pytestmark = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"),
    reason="torch 2.6's FSDP2 asks CPUs for events of GPUs",
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return launch(CHECKS, tmp_path_factory.mktemp("fsdp2"))


@pytest.mark.parametrize("check", names_of(CHECKS))
def test_fsdp2(check: str, results: Results) -> None:
    results.expect(check)


def test_processes_end(results: Results) -> None:
    results.expect_clean_end()
