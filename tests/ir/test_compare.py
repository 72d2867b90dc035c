from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from planish.ir.compare import compare_outputs, tolerance, worst_of
from planish.ir.ledger import ErrorStats

arrays = hnp.arrays(
    st.sampled_from([np.float32, np.float64, np.float16, np.int64, np.int8, np.uint8, np.bool_]),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
)


@given(arrays)
def test_an_array_equals_itself_with_its_nans_and_infinities(array: np.ndarray) -> None:
    stats = compare_outputs({"y": array}, {"y": array.copy()})
    assert (stats.relative_l2, stats.max_abs) == (0.0, 0.0)
    assert stats.cosine == pytest.approx(1.0)


def relative(want: object, got: object) -> float:
    return compare_outputs({"y": want}, {"y": got}).relative_l2


def test_the_figures_are_what_their_names_say() -> None:
    want, got = np.array([3.0, 4.0]), np.array([3.0, 4.5])
    stats = compare_outputs({"y": want}, {"y": got})
    assert stats.relative_l2 == pytest.approx(0.5 / 5.0)
    assert stats.max_abs == 0.5
    assert stats.cosine == pytest.approx((9 + 18) / (5 * math.hypot(3, 4.5)))
    assert stats.output == "y"


@pytest.mark.parametrize(
    ("want", "got"),
    [
        (np.zeros(2, np.float32), np.zeros(3, np.float32)),
        (np.zeros(2, np.float32), np.zeros(2, np.float64)),
        (np.array([1.0, np.nan]), np.array([np.nan, 1.0])),
        (np.array([1.0, np.inf]), np.array([1.0, -np.inf])),
        (np.array([1.0]), np.array([np.nan])),
        (np.zeros(2), np.ones(2)),
        ([np.zeros(2)], [np.zeros(2), np.zeros(2)]),
        ({"a": np.zeros(1)}, {"b": np.zeros(1)}),
        (None, np.zeros(1)),
    ],
)
def test_what_is_never_a_matter_of_degree(want: object, got: object) -> None:
    assert relative(want, got) == math.inf


def test_a_missing_output_is_an_infinite_error() -> None:
    assert compare_outputs({"y": np.zeros(1)}, {}).relative_l2 == math.inf


def test_integers_count_unequal_elements() -> None:
    assert relative(np.array([1, 2, 3, 4]), np.array([1, 2, 3, 9])) == 0.25
    assert relative(np.array(["a", "b"], object), np.array(["a", "c"], object)) == 0.5


def test_bfloat16_is_compared_as_a_float() -> None:
    want = np.array([1.0, 2.0], ml_dtypes.bfloat16)
    assert relative(want, np.array([1.0, 2.015625], ml_dtypes.bfloat16)) < 0.01


def test_the_worst_output_is_named_and_the_other_fields_are_worst_too() -> None:
    want = {"a": np.array([1.0]), "b": np.array([100.0])}
    stats = compare_outputs(want, {"a": np.array([1.1]), "b": np.array([101.0])})
    assert stats.output == "a"
    assert stats.max_abs == 1.0
    assert worst_of([stats, ErrorStats(0.5, 0.0, 1.0, None, "c")]).output == "c"


def test_tolerance_is_that_of_the_least_precise_float() -> None:
    assert tolerance({"a": np.zeros(1, np.float64)}) == 1e-10
    assert tolerance({"a": np.zeros(1, np.float64), "b": np.zeros(1, np.float32)}) == 2e-5
    assert tolerance({"a": np.zeros(1, np.int64)}) == 2e-5
