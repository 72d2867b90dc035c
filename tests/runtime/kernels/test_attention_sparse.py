"""Flash attention over lists of blocks with padding, tiles and sums, and over windows, against float64."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest

pytest.importorskip("tvm")

from planish.runtime.kernels.attention_sparse import BlockSparseFlashAttention
from planish.runtime.kernels.attention_window import UNLIMITED, WindowFlashAttention
from planish.runtime.kernels.cpu import LEVELS, detect
from planish.runtime.kernels.template import Template, aligned, function

TOLERANCE = 2e-6


@functools.cache
def compiled(template: Template, level: str = "") -> Callable[..., None]:
    if level and detect(level) is None:
        pytest.skip(f"the processor lacks {level}")
    return function(template, LEVELS[level] if level else None)


def check(template: Template, arguments: list[np.ndarray], heads: int, level: str = "") -> None:
    q = arguments[0]
    outputs = [aligned(np.full(q.shape, np.nan, np.float32))]
    if template.lse:  # type: ignore[attr-defined]
        outputs.append(aligned(np.full((q.shape[0], heads, q.shape[1]), np.nan, np.float32)))
    compiled(template, level)(*(aligned(a) for a in arguments), *outputs)
    found = template.reference(*arguments)
    wanted = found if isinstance(found, tuple) else (found,)
    assert np.linalg.norm(outputs[0] - wanted[0]) <= TOLERANCE * np.linalg.norm(wanted[0])
    if template.lse:  # type: ignore[attr-defined]
        np.testing.assert_allclose(outputs[1], wanted[1], rtol=2e-6, atol=2e-6)


def tensors(seed: int, batch: int, queries: int, keys: int, heads: int, kv_heads: int, size: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = ((queries, heads), (keys, kv_heads), (keys, kv_heads))
    q, k, v = (rng.standard_normal((batch, length, n * size), np.float32) for length, n in shapes)
    return [3 * q, k, v]


def mask_of_keys(seed: int, batch: int, keys: int) -> np.ndarray:
    """Padded on the left, on the right, and here and there."""
    rng = np.random.default_rng(seed)
    seen = rng.random((batch, keys)) < 0.7
    seen[0] = np.arange(keys) >= keys // 3
    return seen[:, None, None, :]


def vector(value: int) -> np.ndarray:
    return np.array([value], np.int64)


def scale(size: int) -> np.ndarray:
    return np.array([size**-0.5], np.float32)


def lists(seed: int, template: BlockSparseFlashAttention, rows: int, columns: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    block = template.block_size
    chosen = [rng.permutation(np.flatnonzero(rng.random(columns) < 0.5)) for _ in range(3 * rows)]
    ends = np.cumsum([0, *map(len, chosen)])
    indptr = np.stack([ends[n * rows : (n + 1) * rows + 1] for n in range(3)]).astype(np.int32)
    indices = np.concatenate([*chosen, np.zeros(0)]).astype(np.int32)
    found = [indptr, indices, np.array([0, 2, 1, 2], np.int32)]
    if template.tiles:
        found += [rng.integers(-1, 3, len(indices)).astype(np.int32), rng.random((3, block, block)) < 0.5]
    return found


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("block, level", [(64, ""), (16, ""), (48, "avx2")])
def test_lists_with_everything(causal: bool, block: int, level: str) -> None:
    template = BlockSparseFlashAttention(20, causal, block, keys=True, tiles=True, lse=True)
    for queries, keys, past in ((1, 1, 0), (150, 150, 0), (90, 300, 210), (1, 333, 332), (37, 100, 63)):
        arguments = tensors(queries, 2, queries, keys, 4, 2, 20)
        given = lists(keys, template, -(-(queries + past) // block), -(-keys // block))
        mask = mask_of_keys(keys, 2, keys)
        check(template, [*arguments, mask, *given, scale(20), vector(past)], 4, level)
    check(template, [*arguments, np.ones((1, 1, 1, 1), bool), *given, scale(20), vector(past)], 4, level)


@pytest.mark.parametrize("keys, tiles", [(True, False), (False, True)])
def test_lists_with_one(keys: bool, tiles: bool) -> None:
    template = BlockSparseFlashAttention(32, True, 32, keys=keys, tiles=tiles)
    arguments = tensors(1, 2, 100, 100, 4, 2, 32)
    mask = [mask_of_keys(3, 2, 100)] if keys else []
    check(template, [*arguments, *mask, *lists(2, template, 4, 4), scale(32), vector(0)], 4)


WINDOWS = (
    (15, UNLIMITED, 0, 0, 1),
    (0, 0, 0, 0, 0),
    (40, 25, 0, 0, 0),
    (200, UNLIMITED, 4, 0, 1),
    (33, 33, 7, 7, 0),
    (33, 33, 100, 0, 0),
    (10, 10, 0, 70, 0),
    (UNLIMITED, 5, 0, 0, 0),
    (UNLIMITED, UNLIMITED, 0, 0, 1),
    (5, UNLIMITED, 3, 3, 1),
)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("level", ["", "avx2"])
def test_windows(window: tuple[int, ...], level: str) -> None:
    template = WindowFlashAttention(20)
    for queries, past in ((1, 0), (70, 0), (300, 0), (1, 299), (64, 130)):
        arguments = tensors(queries, 2, queries, queries + past, 4, 2, 20)
        given = [scale(20), vector(past), np.array(window, np.int64)]
        check(template, [*arguments, *given], 4, level)


@pytest.mark.parametrize("window", WINDOWS[::3])
def test_windows_with_padding_and_sums(window: tuple[int, ...]) -> None:
    template = WindowFlashAttention(32, keys=True, lse=True)
    for queries, past in ((1, 0), (150, 0), (40, 99)):
        arguments = tensors(queries, 3, queries, queries + past, 4, 2, 32)
        mask = mask_of_keys(queries, 3, queries + past)
        check(template, [*arguments, mask, scale(32), vector(past), np.array(window, np.int64)], 4)


def test_a_wide_window_and_nothing() -> None:
    template = WindowFlashAttention(20)
    for queries in (0, 1000):
        arguments = tensors(queries, 1, queries, queries, 4, 2, 20)
        check(template, [*arguments, scale(20), vector(0), np.array([800, UNLIMITED, 2, 0, 1], np.int64)], 4)
