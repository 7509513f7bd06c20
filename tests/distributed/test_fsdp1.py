"""FSDP1: each check of `checks_fsdp1.py` on two processes."""

from __future__ import annotations

import pytest

from tests.distributed.launch import Results, launch, names_of

CHECKS = "tests.distributed.checks_fsdp1"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return launch(CHECKS, tmp_path_factory.mktemp("fsdp1"))


@pytest.mark.parametrize("check", names_of(CHECKS))
def test_fsdp1(check: str, results: Results) -> None:
    results.expect(check)


def test_processes_end(results: Results) -> None:
    results.expect_clean_end()
