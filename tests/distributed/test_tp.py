"""Tensor parallelism: each check of `checks_tp.py` on two processes."""

from __future__ import annotations

import pytest

from tests.distributed.launch import Results, launch, names_of

CHECKS = "tests.distributed.checks_tp"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return launch(CHECKS, tmp_path_factory.mktemp("tp"))


@pytest.mark.parametrize("check", names_of(CHECKS))
def test_tp(check: str, results: Results) -> None:
    results.expect(check)


def test_processes_end(results: Results) -> None:
    results.expect_clean_end()
