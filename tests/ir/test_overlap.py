"""How alike neighbouring lists of blocks are."""

from __future__ import annotations

import numpy as np
import pytest

from planish.ir.block_sparsity import S2
from planish.ir.block_sparsity.overlap import union_cost
from planish.ir.block_sparsity.pattern import Heads


def lists(*rows: list[int]) -> tuple[np.ndarray, np.ndarray]:
    return np.cumsum([0, *map(len, rows)])[None], np.array([block for row in rows for block in row], np.int32)


def test_alike_lists_cost_no_more_and_others_twice_as_much() -> None:
    assert union_cost(*lists([0, 2, 5], [0, 2, 5], [1], [1])) == 1
    assert union_cost(*lists([0, 2], [1, 3])) == 2
    assert union_cost(*lists([0, 1, 2], [0, 1, 2, 3])) == pytest.approx(8 / 7)
    assert union_cost(*lists([], [1], [])) == 2 and union_cost(*lists([])) == 1 and union_cost(*lists([], [])) == 1


def test_rows_of_s2_are_alike() -> None:
    layout = S2(block=64, local=16, stride=8).layout(32768, Heads(32, 32))
    assert 1 < union_cost(layout.indptr, layout.indices) < 1.05


def test_several_layouts_lie_one_behind_the_other() -> None:
    indptr = np.array([[0, 1, 2], [2, 4, 6]])
    assert union_cost(indptr, np.array([0, 0, 0, 1, 2, 3])) == pytest.approx((2 + 8) / 6)
