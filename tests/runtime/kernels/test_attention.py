"""Flash attention, dense and block-sparse, against float64 and against ONNX Runtime's own operators."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm")

import onnxruntime as ort
from onnx import TensorProto, helper

from planish.runtime.kernels.attention import FlashAttention
from planish.runtime.kernels.attention_sparse import BlockSparseFlashAttention
from planish.runtime.kernels.cpu import LEVELS, detect
from planish.runtime.kernels.template import Template, aligned, function

TOLERANCE = 2e-6
LOWEST = np.finfo(np.float32).min


@functools.cache
def compiled(template: Template, level: str = "") -> Callable[..., None]:
    if level and detect(level) is None:
        pytest.skip(f"the processor lacks {level}")
    return function(template, LEVELS[level] if level else None)


def run(template: Template, arguments: list[np.ndarray], level: str = "") -> np.ndarray:
    """The kernel's result; where it left something unwritten there is NaN."""
    y = aligned(np.full(arguments[0].shape, np.nan, np.float32))
    compiled(template, level)(*(aligned(a) for a in arguments), y)
    return y


def check(template: Template, arguments: list[np.ndarray], level: str = "") -> None:
    got, want = run(template, arguments, level), template.reference(*arguments)
    assert got.shape == want.shape
    assert np.isfinite(got).all()
    assert np.linalg.norm(got - want) <= TOLERANCE * np.linalg.norm(want)


def tensors(seed: int, batch: int, queries: int, keys: int, heads: int, kv_heads: int, size: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = ((queries, heads), (keys, kv_heads), (keys, kv_heads))
    q, k, v = (rng.standard_normal((batch, length, n * size), np.float32) for length, n in shapes)
    return [3 * q, k, v]


def scale(size: int) -> np.ndarray:
    return np.array([size**-0.5], np.float32)


def offset(value: int) -> np.ndarray:
    return np.array([value], np.int64)


# Lengths around the blocks of 64 queries and 128 keys, and around a vector.
@pytest.mark.parametrize("queries, keys", [(1, 1), (1, 300), (5, 17), (64, 128), (65, 129), (130, 127), (197, 197)])
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (6, 2), (4, 1)])
def test_dense(queries: int, keys: int, heads: int, kv_heads: int) -> None:
    arguments = tensors(queries + keys, 2, queries, keys, heads, kv_heads, 32)
    check(FlashAttention(32), [*arguments, scale(32)])


@pytest.mark.parametrize("batch, queries, keys", [(0, 4, 4), (2, 0, 4), (2, 4, 0), (0, 0, 0)])
def test_nothing(batch: int, queries: int, keys: int) -> None:
    arguments = tensors(0, batch, queries, keys, 2, 2, 32)
    got = run(FlashAttention(32), [*arguments, scale(32)])
    np.testing.assert_array_equal(got, np.zeros((batch, queries, 64), np.float32))


@pytest.mark.parametrize("size", [1, 20, 64, 80, 96, 128, 256])
def test_head_sizes(size: int) -> None:
    check(FlashAttention(size), [*tensors(size, 2, 70, 150, 4, 2, size), scale(size)])


@pytest.mark.parametrize("size", [20, 64])
def test_narrow_vectors(size: int) -> None:
    for queries, keys in ((1, 40), (33, 131), (100, 7)):
        check(FlashAttention(size), [*tensors(keys, 2, queries, keys, 2, 1, size), scale(size)], "avx2")


@pytest.mark.parametrize("queries, keys", [(1, 1), (1, 200), (63, 63), (64, 64), (150, 150), (40, 300), (300, 40)])
def test_causal(queries: int, keys: int) -> None:
    arguments = tensors(queries, 2, queries, keys, 4, 2, 32)
    for past in sorted({0, 7, keys - queries}):
        check(FlashAttention(32, causal=True), [*arguments, scale(32), offset(past)])


def mask_of(kind: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    seen = rng.random(shape) < 0.6
    if kind == "bool":
        return seen
    hidden = rng.choice(np.array([-np.inf, LOWEST, -30], np.float32), shape)
    return np.where(seen, 2 * rng.standard_normal(shape), hidden).astype(np.float32)


@pytest.mark.parametrize("kind", ["float", "bool"])
@pytest.mark.parametrize("full", [(0, 0, 0, 0), (1, 0, 0, 1), (0, 1, 1, 1), (1, 1, 1, 1), (0, 0, 1, 0)])
def test_masks(kind: str, full: tuple[int, ...]) -> None:
    for queries, keys in ((1, 9), (70, 140), (67, 67)):
        arguments = tensors(keys, 2, queries, keys, 4, 2, 32)
        shape = tuple(n if f else 1 for n, f in zip((2, 4, queries, keys), full, strict=True))
        mask = mask_of(kind, shape, keys)
        check(FlashAttention(32, mask=kind), [*arguments, mask, scale(32)])


@pytest.mark.parametrize("kind", ["float", "bool"])
def test_causal_masks(kind: str) -> None:
    arguments = tensors(0, 2, 90, 200, 2, 2, 32)
    mask = mask_of(kind, (2, 1, 1, 200), 0)
    check(FlashAttention(32, causal=True, mask=kind), [*arguments, mask, scale(32), offset(110)])


def test_large_scores_and_later_maxima() -> None:
    """Sums of blocks that no longer count, and weights that vanish, leave no trace and no NaN."""
    q, k, v = tensors(1, 1, 70, 600, 1, 1, 32)
    k *= np.linspace(0, 8, 600, dtype=np.float32)[None, :, None]
    check(FlashAttention(32), [q, k, v, scale(32)])


def layouts(seed: int, count: int, rows: int, columns: int, density: float) -> tuple[np.ndarray, np.ndarray]:
    """Random lists, unordered; some are empty."""
    rng = np.random.default_rng(seed)
    seen = rng.random((count, rows, columns)) < density
    lists = [rng.permutation(np.flatnonzero(row)) for row in seen.reshape(-1, columns)]
    ends = np.concatenate([[0], np.cumsum([len(one) for one in lists])]).astype(np.int32)
    indptr = np.stack([ends[i * rows : (i + 1) * rows + 1] for i in range(count)])
    return indptr, np.concatenate([*lists, np.zeros(0)]).astype(np.int32)


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("causal", [False, True])
def test_block_sparse(causal: bool, density: float) -> None:
    template = BlockSparseFlashAttention(32, causal, 64)
    for queries, keys, past in (
        (1, 1, 0),
        (200, 200, 0),
        (128, 320, 192),
        (100, 150, 0),
        (1, 333, 332),
        (90, 300, 210),
    ):
        arguments = tensors(queries, 2, queries, keys, 4, 2, 32)
        lists = layouts(keys, 3, -(-(queries + past) // 64), -(-keys // 64), density)
        which = np.array([0, 2, 1, 2], np.int32)
        check(template, [*arguments, *lists, which, scale(32), offset(past)])


@pytest.mark.parametrize("block, level", [(32, ""), (128, ""), (48, ""), (64, "avx2"), (32, "avx2")])
def test_block_sizes(block: int, level: str) -> None:
    arguments = tensors(block, 1, 300, 300, 2, 2, 64)
    lists = layouts(block, 2, -(-300 // block), -(-300 // block), 0.4)
    which = np.array([1, 0], np.int32)
    for causal in (False, True):
        template = BlockSparseFlashAttention(64, causal, block)
        check(template, [*arguments, *lists, which, scale(64), offset(0)], level)


def test_lists_out_of_bounds_are_no_keys() -> None:
    arguments = tensors(0, 1, 130, 130, 1, 1, 32)
    template = BlockSparseFlashAttention(32, False, 64)
    rest = [np.zeros(1, np.int32), scale(32), offset(0)]
    wild = run(template, [*arguments, np.array([[0, 3, 5]], np.int32), np.array([0, 9, -1, 1, 2], np.int32), *rest])
    tame = run(template, [*arguments, np.array([[0, 1, 3]], np.int32), np.array([0, 1, 2], np.int32), *rest])
    np.testing.assert_array_equal(wild[:, :128], tame[:, :128])
    # Positions from 128 on have no row.
    assert not wild[:, 128:].any()


def onnx_attention(
    arguments: list[np.ndarray], heads: int, kv_heads: int, mask: np.ndarray | None = None, **attributes: Any
) -> np.ndarray:
    feeds = dict(zip(("q", "k", "v"), arguments, strict=True)) | ({} if mask is None else {"mask": mask})
    infos = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for name, a in feeds.items()
    ]
    node = helper.make_node("Attention", list(feeds), ["y"], q_num_heads=heads, kv_num_heads=kv_heads, **attributes)
    graph = helper.make_graph([node], "g", infos, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feeds)[0])


@pytest.mark.parametrize("kind", ["none", "bool", "inf", "lowest"])
def test_meaning_is_that_of_onnxruntime(kind: str) -> None:
    """Rows without keys included."""
    arguments = tensors(3, 2, 20, 30, 4, 2, 32)
    mask = None
    if kind != "none":
        seen = np.random.default_rng(0).random((2, 1, 20, 30)) < 0.5
        seen[:, :, ::4] = False
        mask = seen if kind == "bool" else np.where(seen, 0, -np.inf if kind == "inf" else LOWEST).astype(np.float32)
    want = onnx_attention(arguments, 4, 2, mask)
    name = "none" if mask is None else "bool" if mask.dtype == bool else "float"
    got = run(FlashAttention(32, mask=name), [*arguments, *([] if mask is None else [mask]), scale(32)])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=3e-6)
    assert mask is None or not got[:, ::4].any()


def test_causal_meaning_is_that_of_onnxruntime() -> None:
    """Without a past the diagonal starts at the first key, even if there are more keys than queries."""
    for queries, keys in ((20, 30), (30, 20)):
        arguments = tensors(4, 1, queries, keys, 2, 2, 32)
        want = onnx_attention(arguments, 2, 2, is_causal=1)
        got = run(FlashAttention(32, causal=True), [*arguments, scale(32), offset(0)])
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=3e-6)


def test_fields_are_checked() -> None:
    with pytest.raises(ValueError, match="head_size is 0"):
        FlashAttention(0)
    with pytest.raises(ValueError, match="mask is one of none, float, bool, not 'int'"):
        FlashAttention(8, mask="int")
    with pytest.raises(ValueError, match="block_size is 24; it must be a multiple of 16"):
        BlockSparseFlashAttention(8, block_size=24)
