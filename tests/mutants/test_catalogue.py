"""Every mutant still fits the code, so that `make mutants` can run; it takes minutes, this takes none."""

from __future__ import annotations

import pytest

from tests.mutants.catalogue import MUTANTS
from tests.mutants.run import ROOT, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"row-{m.row}-{m.file}")
def test_the_guard_is_there(mutant: Mutant) -> None:
    source = (ROOT / "lfu_reg" / mutant.file).read_text()
    compile(mutant.applied(source), mutant.file, "exec")
