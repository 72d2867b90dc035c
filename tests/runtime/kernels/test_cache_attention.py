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
    if kernel.cache == "float16":
        given += [rng.standard_normal((batch, heads, capacity, d)).astype(np.float16) for _ in "kv"]
        given += [np.array(lengths, np.int32)]
    else:
        given += [rng.integers(-127, 128, (batch, heads, capacity, d)).astype(np.int8) for _ in "kv"]
        given += [rng.uniform(0.001, 0.03, (batch, heads, capacity)) for _ in "kv"]
        given += [np.array(lengths, np.int32), rng.uniform(0.2, 4, (heads, d))]
    given += [np.array([d**-0.5]), np.array([window], np.int64)]
    return [aligned(a.astype(np.float32) if a.dtype == np.float64 else a) for a in given]


def check(kernel: CacheAttention, level: str, given: list[np.ndarray]) -> None:
    want = kernel.reference(*(a.copy() for a in given))
    y = aligned(np.full(given[0].shape, np.nan, np.float32))
    compiled(kernel, level)(*given, y)
    for found, expected in zip(given[3:], want[:-1], strict=False):
        np.testing.assert_array_equal(found, expected)
    assert np.linalg.norm(y - want[-1]) <= TOLERANCE * np.linalg.norm(want[-1])


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
@pytest.mark.parametrize("form", [(64, 1), (8, 7), (40, 2, "float16")])
def test_heads_of_any_size(form: tuple[Any, ...], level: str) -> None:
    kernel = CacheAttention(*form)
    for lengths, capacity in (([0], 1), ([127, 128, 5], 129), ([260], 512)):
        check(kernel, level, arguments(kernel, lengths, capacity))


def test_tokens_of_nothing_and_of_large_numbers() -> None:
    kernel = CacheAttention(24, 3)
    given = arguments(kernel, [3, 3], 4)
    given[1][0], given[2][0] = 0, 0
    given[1][1] = 1e30
    given[2][1, :, 5] = 1e-33
    check(kernel, "avx512" if detect("avx512") else "avx2", given)


def test_numbers_beyond_float16_become_its_largest() -> None:
    kernel = CacheAttention(40, 2, "float16")
    given = arguments(kernel, [3], 4)
    given[1][:, :, 1], given[1][:, :, 2], given[0][:] = 1e9, -1e9, 0
    check(kernel, "avx512" if detect("avx512") else "avx2", given)
    assert np.isfinite(given[3]).all() and np.abs(given[3]).max() == 65504


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


@pytest.mark.parametrize("form", [(12, 1), (4, 1), (8, 0), (8, 1, "int4")])
def test_what_there_is_no_kernel_for(form: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="must be"):
        CacheAttention(*form)
