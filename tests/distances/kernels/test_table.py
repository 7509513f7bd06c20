"""The table of layers, the tiles, and when 16-byte accesses are allowed."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from lfu_reg.distances.kernels.problem import describe_problems
from lfu_reg.distances.kernels.table import COLUMNS, Table, build_table
from tests.distances.kernels.reference import make

BRAIN = torch.bfloat16


def table_of(
    clean: list[Tensor], perturbed: list[Tensor], index: Any = None, wanted: Any = None, reduction: str = "mean"
) -> Table:
    (problem,) = describe_problems(clean, perturbed, index, reduction)
    return build_table(problem, clean, perturbed, wanted or [True] * len(clean))


def column(table: Table, name: str) -> list[int]:
    return table.values[:, COLUMNS.index(name)].tolist()


def test_at_most_eight_columns() -> None:
    assert len(set(COLUMNS)) == len(COLUMNS) <= 8


def test_one_row_per_layer() -> None:
    clean, perturbed = make([(3, 8, 64), (4, 32), (3, 8, 64)], BRAIN)
    index = torch.arange(5)
    table = table_of(clean, perturbed, [index, None, index])
    assert column(table, "clean") == [h.data_ptr() for h in clean]
    assert column(table, "perturbed") == [h.data_ptr() for h in perturbed]
    assert column(table, "index") == [index.data_ptr(), 0, index.data_ptr()]
    assert column(table, "selected") == [5, 4, 5]
    assert column(table, "positions") == [24, 4, 24]
    assert column(table, "hidden") == [64, 32, 64]
    assert column(table, "divisor") == [5 * 64, 4 * 32, 5 * 64]
    assert column(table_of(clean, perturbed, [index, None, index], reduction="sum"), "divisor") == [5, 4, 5]
    assert table.has_index
    assert not table_of(clean, perturbed).has_index


def test_gradients_that_nobody_wants_take_no_room() -> None:
    table = table_of(*make([(2, 8), (3, 8), (5, 8), (1, 8)]), wanted=[True, False, True, True])
    assert column(table, "offset") == [0, -1, 16, 56]
    assert table.elements == 64


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize(("shift", "hidden", "aligned"), [(0, 64, True), (1, 64, False), (8, 64, True), (0, 60, False)])
def test_wide_accesses_need_aligned_addresses_and_rows(shift: int, hidden: int, aligned: bool, side: int) -> None:
    sides = make([(4, hidden)] * 2, BRAIN)
    memory = torch.zeros(4 * hidden + 16, dtype=BRAIN)
    sides[side][1] = memory[shift : shift + 4 * hidden].view(4, hidden)
    assert table_of(*sides).aligned is aligned


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(("hidden", "width"), [(1, 1), (17, 32), (64, 64), (257, 128), (768, 256), (4096, 4096)])
def test_tiles_cover_a_row_with_few_idle_lanes(hidden: int, width: int) -> None:
    from lfu_reg.distances.kernels.triton_launch import TILE, block_width

    assert block_width(hidden, TILE) == width


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(("tokens", "layers"), [(1, 1), (2048, 32), (1 << 22, 32)])
def test_partial_sums_are_bounded(tokens: int, layers: int) -> None:
    """Every tile belongs to a program, and programs have at least their share."""
    from lfu_reg.distances.kernels import triton_launch

    states = torch.zeros(1, 4096, dtype=BRAIN).expand(tokens, 4096)
    (problem,) = describe_problems([states] * layers, [states] * layers, None, "mean")
    table = build_table(problem, [states] * layers, [states] * layers, [False] * layers)
    options = triton_launch.launch_options(problem.dtypes, table)
    share, programs = triton_launch._grid(problem, table, options, 4)
    assert share >= 4
    assert share * programs >= tokens
    assert programs * layers <= triton_launch.MAX_PARTIALS + layers
