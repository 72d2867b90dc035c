from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planish.passes.precision.ranges import METHODS, Range, range_of, rounded


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=50), st.sampled_from(METHODS))
def test_zero_has_a_code_and_codes_are_codes(numbers, method):
    found = range_of([np.array(numbers, "f4")], method, 99.9)
    assert 0 <= found.zero <= 255 and found.scale > 0
    assert rounded(np.zeros(1, "f4"), found)[0] == 0


def test_min_max_holds_everything():
    arrays = [np.array([-1.0, 3.0], "f4"), np.array([7.0], "f4")]
    found = range_of(arrays, "min-max", 99.9)
    for array in arrays:
        assert np.abs(rounded(array, found) - array).max() <= found.scale / 2 * 1.001


def test_what_is_never_negative_uses_all_codes():
    assert range_of([np.array([0.5, 2.0], "f4")], "min-max", 99.9) == Range(float(np.float32(2 / 255)), 0)


@pytest.mark.parametrize("method", ["percentile", "mse"])
def test_outliers_are_clipped(method):
    numbers = np.random.default_rng(0).standard_normal(100_000).astype("f4")
    numbers[7] = 40
    whole, clipped = range_of([numbers], "min-max", 0), range_of([numbers], method, 99.9)
    assert clipped.scale < 0.9 * whole.scale
    inner = np.abs(numbers) < 3
    assert (
        np.square(rounded(numbers, clipped) - numbers)[inner].mean()
        < np.square(rounded(numbers, whole) - numbers)[inner].mean()
    )


def test_mse_loses_least_of_the_three():
    numbers = (np.random.default_rng(0).standard_normal(100_000) ** 3).astype("f4")
    errors = {m: np.square(rounded(numbers, range_of([numbers], m, 99.0)) - numbers).mean() for m in METHODS}
    assert errors["mse"] == min(errors.values()) < errors["min-max"]


def test_nothing_to_measure():
    assert range_of([np.zeros((0, 4), "f4")], "mse", 99.9) == Range(1.0, 0)
