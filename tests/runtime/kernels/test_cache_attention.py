"""A step over a cache of 8 bits, the kernel by itself: against float64, at lengths that no tile divides."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tvm")

from planish.runtime.kernels.cache_attention import CacheAttention
from planish.runtime.kernels.cpu import LEVELS, detect
from planish.runtime.kernels.template import aligned, function

UNLIMITED = 1 << 40
TOLERANCE = 2e-6


@functools.cache
def compiled(kernel: CacheAttention, level: str) -> Callable[..., None]:
    if detect(level) is None:
        pytest.skip(f"the processor lacks {level}")
    return function(kernel, LEVELS[level])


def arguments(
    kernel: CacheAttention, lengths: list[int], capacity: int, heads: int = 2, window: int = UNLIMITED, seed: int = 0
) -> list[np.ndarray]:
    rng = np.random.default_rng([seed, capacity])
    batch, d = len(lengths), kernel.head_size
    given: list[Any] = [rng.standard_normal((batch, heads, kernel.group, d))]
    given += [rng.standard_normal((batch, heads, d)) * rng.exponential(size=d) for _ in "kv"]
    given += [rng.integers(-127, 128, (batch, heads, capacity, d)).astype(np.int8) for _ in "kv"]
    given += [rng.uniform(0.001, 0.03, (batch, heads, capacity)) for _ in "kv"]
    given += [np.array(lengths, np.int32), rng.uniform(0.2, 4, (heads, d)), np.array([d**-0.5])]
    given += [np.array([window], np.int64)]
    return [aligned(a.astype(np.float32) if a.dtype == np.float64 else a) for a in given]


def check(kernel: CacheAttention, level: str, given: list[np.ndarray]) -> None:
    want = kernel.reference(*(a.copy() for a in given))
    y = aligned(np.full(given[0].shape, np.nan, np.float32))
    compiled(kernel, level)(*given, y)
    for name, found, expected in zip(("keys", "values", "key scales", "value scales"), given[3:7], want, strict=False):
        np.testing.assert_array_equal(found, expected, err_msg=name)
    assert np.linalg.norm(y - want[4]) <= TOLERANCE * np.linalg.norm(want[4])


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=3),
    room=st.integers(1, 20),
    window=st.sampled_from([1, 7, 128, 129, UNLIMITED]),
    seed=st.integers(0, 99),
)
def test_any_lengths(lengths: list[int], room: int, window: int, seed: int) -> None:
    kernel = CacheAttention(24, 3)
    given = arguments(kernel, lengths, max(lengths) + room, window=window, seed=seed)
    check(kernel, "avx512" if detect("avx512") else "avx2", given)


@pytest.mark.parametrize("level", ["avx512", "avx2"])
@pytest.mark.parametrize(("size", "group"), [(64, 1), (8, 7), (40, 2)])
def test_heads_of_any_size(size: int, group: int, level: str) -> None:
    kernel = CacheAttention(size, group)
    for lengths, capacity in (([0], 1), ([127, 128, 5], 129), ([260], 512)):
        check(kernel, level, arguments(kernel, lengths, capacity))


def test_tokens_of_nothing_and_of_large_numbers() -> None:
    kernel = CacheAttention(24, 3)
    given = arguments(kernel, [3, 3], 4)
    given[1][0], given[2][0] = 0, 0
    given[1][1] = 1e30
    given[2][1, :, 5] = 1e-33
    check(kernel, "avx512" if detect("avx512") else "avx2", given)


def test_nothing_but_the_token_is_written() -> None:
    kernel = CacheAttention(24, 3)
    given = arguments(kernel, [2, 9], 12)
    before = [a.copy() for a in given]
    compiled(kernel, "avx512" if detect("avx512") else "avx2")(*given, aligned(np.zeros_like(given[0])))
    for index in range(3, 7):
        changed = np.argwhere(before[index] != given[index])
        assert {(int(row), int(at)) for row, _, at, *_ in changed} == {(0, 2), (1, 9)}
    for index in (*range(3), *range(7, 11)):
        np.testing.assert_array_equal(before[index], given[index])


@pytest.mark.parametrize(("size", "group"), [(12, 1), (4, 1), (8, 0)])
def test_what_there_is_no_kernel_for(size: int, group: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        CacheAttention(size, group)
