"""Kernels of single operators (products of activations, softmax, reductions, images, indices) against float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from planish.runtime.kernels.batched import BatchedMatMul
from planish.runtime.kernels.images import DepthwiseConv, Patches, Pool, Window
from planish.runtime.kernels.indices import MESSAGE, CheckIndices
from planish.runtime.kernels.reductions import KINDS, Reduce, Softmax
from planish.runtime.kernels.template import Template, aligned, function
from tests.runtime.kernels.levels import VECTORS, level

pytest.importorskip("tvm")

WINDOWS = (
    Window((1, 1)),
    Window((3, 3), begins=(1, 1)),
    Window((2, 3), (2, 1), (1, 2), (0, 2)),
    Window((7, 7), (2, 2), begins=(3, 3)),
)


def normal(*shape: int) -> np.ndarray:
    return aligned(np.random.default_rng().standard_normal(shape).astype(np.float32))


def close(call: object, template: Template, inputs: list[np.ndarray], shape: tuple[int, ...], sized: bool) -> None:
    """Runs a kernel on memory full of NaN and compares; `sized` references take the output for its sizes."""
    got = aligned(np.full(shape, np.nan, np.float32))
    call(*inputs, got)  # type: ignore[operator]
    want = template.reference(*inputs, *([got] if sized else []))
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5, err_msg=f"{[a.shape for a in inputs]}")


@pytest.mark.parametrize("name", VECTORS)
def test_products_of_stacks(name: str) -> None:
    template, rng = BatchedMatMul(), np.random.default_rng()
    call = function(template, level(name))
    odd = [tuple(rng.integers(1, 70, 3)) for _ in range(4)]
    for m, k, n in [(1, 1, 1), (12, 8, 32), (13, 5, 33), (6, 64, 16), (3, 0, 4), (31, 17, 65), *odd]:
        for lefts, rights in ((1, 1), (3, 3), (1, 3), (3, 1)):
            close(call, template, [normal(lefts, m, k), normal(rights, k, n)], (max(lefts, rights), m, n), False)


@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize("log", (False, True))
def test_softmax(name: str, log: bool) -> None:
    template = Softmax(log)
    call = function(template, level(name))
    for rows, width in ((0, 4), (1, 1), (3, 7), (2, 16), (5, 197), (4, 64)):
        x = normal(rows, width)
        x *= 20
        if width > 2 and not log:
            x[:, 1] = -np.inf
        close(call, template, [x], (rows, width), False)


@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize("kind", KINDS)
def test_reductions(name: str, kind: str) -> None:
    template = Reduce(kind)
    call = function(template, level(name))
    for outer, width, inner in ((1, 1, 1), (3, 50, 1), (2, 49, 64), (2, 7, 67), (1, 5, 3), (4, 64, 128)):
        close(call, template, [normal(outer, width, inner)], (outer, inner), False)


@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize("window", WINDOWS, ids=lambda w: w.name)
def test_images(name: str, window: Window) -> None:
    templates: list[Template] = [Patches(window), DepthwiseConv(window), *(Pool(window, k) for k in ("max", "mean"))]
    calls = [function(template, level(name)) for template in templates]
    taps = window.kernel[0] * window.kernel[1]
    for (batch, size), channels in itertools.product(((1, 9), (2, 12)), (1, 3, 16, 85)):
        x = normal(batch, size, size + 1, channels)
        rows, columns = (
            (x.shape[1 + a] + 2 * window.begins[a] - (window.kernel[a] - 1) * window.dilations[a] - 1)
            // window.strides[a]
            + 1
            for a in range(2)
        )
        shape = (batch, rows, columns, channels)
        lines = aligned(x.reshape(batch, size, -1))
        close(calls[0], templates[0], [lines], (*shape[:3], taps * channels), True)
        close(calls[1], templates[1], [x, normal(taps, channels), normal(channels)], shape, True)
        for call, template in zip(calls[2:], templates[2:], strict=True):
            close(call, template, [x], shape, True)


@pytest.mark.parametrize("dtype", ("int64", "int32"))
def test_indices_are_checked(dtype: str) -> None:
    template = CheckIndices(dtype)
    call = function(template, level("avx2"))
    rng, limits = np.random.default_rng(), aligned(np.array([7, 3]))
    good = aligned(np.stack([rng.integers(-7, 7, 50), rng.integers(-3, 3, 50)], 1).astype(dtype))
    got = aligned(np.full(good.shape, -1, np.int64))
    call(good, limits, got)
    np.testing.assert_array_equal(got, template.reference(good, limits))
    for axis, wrong in ((0, 7), (0, -8), (1, 3), (1, -4)):
        bad = good.copy()
        bad[rng.integers(50), axis] = wrong
        with pytest.raises(RuntimeError, match=MESSAGE):
            call(aligned(bad), limits, got)
