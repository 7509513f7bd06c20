"""The table of layers: what is filled in at every call, what is reused, and when 16-byte accesses are allowed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lfu_reg.distances.kernels.mse_layout import FIELDS, WIDTH
from lfu_reg.distances.kernels.mse_problem import describe_problems
from lfu_reg.distances.kernels.mse_table import Table, build_table, strides_of
from tests.distances.kernels.reference import make

BRAIN = torch.bfloat16


def table_of(clean: list[Tensor], perturbed: list[Tensor], index: Any = None, wants: Any = None) -> Table:
    (problem,) = describe_problems(clean, perturbed, index, None, "mean", "clean", False)
    return build_table(problem, clean, perturbed, wants or (True,) * len(clean), strides_of(clean, perturbed))


def column(table: Table, name: str) -> list[int]:
    return table.values.view(-1, WIDTH)[:, FIELDS.index(name)].tolist()


def test_what_each_call_fills_in() -> None:
    """Addresses and token indices are new; the rest is reused, even for indices of another length."""
    tables = []
    for length in (4, 7):
        clean, perturbed = make([(3, 8, 64)] * 3, BRAIN)
        index = torch.arange(length)
        table = table_of(clean, perturbed, [index, None, index])
        assert column(table, "clean") == [h.data_ptr() for h in clean]
        assert column(table, "perturbed") == [h.data_ptr() for h in perturbed]
        assert column(table, "selected") == [length, 24, length]
        assert column(table, "index") == [index.data_ptr(), 0, index.data_ptr()]
        scales = torch.tensor(column(table, "scale"), dtype=torch.int32).view(torch.float32)
        assert torch.equal(scales, torch.tensor([1 / (length * 64), 1 / (24 * 64), 1 / (length * 64)]))
        tables.append(table)
    assert tables[0].rows is tables[1].rows
    assert column(tables[0], "selected") == [4, 24, 4], "the second call changed the first one's table"


def test_rows_are_grouped_by_dtype_with_unwanted_gradients_first() -> None:
    first, second = make([(2, 8)] * 3, BRAIN), make([(3, 8)] * 2, torch.float32)
    sides = [[a[0], b[0], a[1], b[1], a[2]] for a, b in zip(first, second, strict=True)]
    table = table_of(*sides, wants=(True, True, False, True, True))
    assert table.rows.order == (2, 0, 4, 1, 3)
    assert [(g.first, g.count, g.skip, g.elements) for g in table.rows.groups] == [(0, 3, 1, 32), (3, 2, 0, 48)]
    assert column(table, "slot") == [2, 0, 4, 1, 3]
    assert column(table, "offset") == [0, 0, 16, 0, 24]
    assert column(table, "clean") == [sides[0][layer].data_ptr() for layer in table.rows.order]


def test_layers_with_one_index_share_a_mask_that_one_of_them_fills() -> None:
    index, other = torch.arange(3), torch.arange(2)
    table = table_of(*make([(6, 8), (6, 8), (6, 4), (5, 8), (6, 8)]), [index, index, index, index, other])
    assert column(table, "mask") == [0, 0, 0, 6, 11]
    assert column(table, "owns_mask") == [1, 0, 0, 1, 1]
    assert table.rows.mask_size == 17
    assert table.most_selected == 3


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize(("shift", "hidden", "aligned"), [(0, 64, True), (1, 64, False), (8, 64, True), (0, 60, False)])
def test_wide_accesses_need_aligned_addresses_and_strides(shift: int, hidden: int, aligned: bool, side: int) -> None:
    """After a call with the same shapes whose addresses were aligned."""
    sides = make([(4, hidden)] * 2, BRAIN)
    assert table_of(*sides).rows.groups[0].aligned == (hidden == 64)
    memory = torch.zeros(4 * hidden + 16, dtype=BRAIN)
    sides[side][1] = memory[shift : shift + 4 * hidden].view(4, hidden)
    (group,) = table_of(*sides).rows.groups
    assert group.aligned is aligned
    assert group.vector == (8 if aligned else 1)
    assert group.alignment == (16 if aligned else 2)
