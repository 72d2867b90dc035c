"""Index sets of Unified Layer Skipping: the paper's, and what the balanced ones guarantee."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planish.ir.errors import InputError
from planish.passes.layers.selection import balanced, kept_count, released, removed_by_rule

#: (layers, speed-up) → the layers that the released code keeps.
PAPER = {
    (30, 2): (*range(0, 27, 2), 29),
    (30, 3): (*range(0, 25, 3), 29),
    (30, 5): (0, 6, 12, 18, 24, 29),
    (30, 10): (0, 15, 29),
    (32, 2): (*range(0, 29, 2), 31),
    (32, 3): (*range(0, 25, 3), 31),
    (40, 5): (0, 5, 10, 15, 20, 25, 30, 39),
}

SIZES = st.integers(2, 130)


@st.composite
def sizes_and_ratios(draw: st.DrawFn) -> tuple[int, float]:
    total = draw(SIZES)
    return total, draw(st.floats(1, total / 2))


@pytest.mark.parametrize(("total", "speedup"), PAPER)
def test_released_is_the_papers_index_set(total: int, speedup: int) -> None:
    kept = released(total, kept_count(total, speedup))
    assert kept == PAPER[total, speedup]
    assert len(kept) == total // speedup
    assert set(removed_by_rule(total, speedup, "released")) == set(range(total)) - set(kept)


def test_released_drops_one_block_below_two_and_balanced_does_not() -> None:
    assert released(32, kept_count(32, 1.5)) == (*range(20), 31)
    gaps = [b - a for a, b in pairwise(balanced(32, kept_count(32, 1.5)))]
    assert set(gaps) == {1, 2}


def test_balanced_at_two() -> None:
    assert balanced(12, 6) == (0, 2, 4, 7, 9, 11)
    assert removed_by_rule(12, 2) == (1, 3, 5, 6, 8, 10)
    assert removed_by_rule(12, 1) == ()
    assert balanced(5, 1) == (0,) and released(5, 1) == (0,)


@given(sizes_and_ratios())
def test_balanced_has_no_block_and_no_tail_gap(case: tuple[int, float]) -> None:
    total, speedup = case
    count = kept_count(total, speedup)
    kept = balanced(total, count)
    assert len(set(kept)) == count and kept[0] == 0 and kept[-1] == total - 1
    gaps = [b - a for a, b in pairwise(kept)]
    assert max(gaps) - min(gaps) <= 1
    assert total / count >= speedup - 1e-6  # the nominal ratio is at least the asked one


@given(sizes_and_ratios())
def test_released_keeps_as_many(case: tuple[int, float]) -> None:
    total, speedup = case
    count = kept_count(total, speedup)
    kept = released(total, count)
    assert kept[0] == 0 and kept[-1] == total - 1 and len(kept) == count
    assert list(kept) == sorted(set(kept))


@pytest.mark.parametrize(("total", "speedup"), [(12, 1.2), (10, 10 / 3), (9, 9 / 7), (96, 96 / 7)])
def test_a_ratio_of_whole_numbers_is_met_exactly(total: int, speedup: float) -> None:
    assert total / kept_count(total, speedup) == pytest.approx(speedup)


@pytest.mark.parametrize("speedup", [0.99, 0, -2, float("nan")])
def test_below_one_names_the_range(speedup: float) -> None:
    with pytest.raises(InputError, match=r"it is between 1 \(keep all\) and 6 for 12 layers"):
        kept_count(12, speedup)


def test_above_what_is_possible_names_the_range() -> None:
    message = "speedup is 10; 12 layers allow between 1 and 6, since the first and the last are always kept"
    with pytest.raises(InputError, match=message):
        kept_count(12, 10)
    with pytest.raises(InputError, match="allow between 1 and 12, since one is always kept"):
        kept_count(12, 13, least=1)
    with pytest.raises(InputError, match="between 1 and 0.5"):
        kept_count(1, 1)
