"""Normalization kernels against float64, on every level that this processor has."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from planish.runtime.kernels.cpu import Cpu
from planish.runtime.kernels.norms import LayerNorm, RmsNorm
from planish.runtime.kernels.template import Template, aligned, function
from tests.runtime.kernels.levels import VECTORS, level

pytest.importorskip("tvm")

SHAPES = ((0, 8), (3, 0), (1, 1), (1, 768), (5, 7), (2, 15), (3, 16), (4, 17), (7, 63), (3, 64), (2, 197), (9, 384))
TEMPLATES: tuple[Template, ...] = (
    *(LayerNorm(r, s, b) for r, s, b in itertools.product((False, True), (False, True), (False, True)) if r or not s),
    *(RmsNorm(r, s) for r, s in ((False, False), (True, False), (True, True))),
)


def arguments(
    template: Template, rows: int, width: int, rng: np.random.Generator, mean: float = 0.0
) -> list[np.ndarray]:
    """Inputs of a kernel; statistics differ between rows."""

    def matrix() -> np.ndarray:
        spread = np.exp(rng.uniform(-3, 3, (rows, 1)))
        return aligned((mean + spread * rng.standard_normal((rows, width)) + rng.normal(size=(rows, 1))).astype("f"))

    found = [matrix()]
    if template.residual:  # type: ignore[attr-defined]
        found.append(matrix())
    found.append(aligned(rng.uniform(0.5, 1.5, width).astype("f")))
    if isinstance(template, LayerNorm) and template.bias:
        found.append(aligned(rng.normal(size=width).astype("f")))
    return [*found, aligned(np.array([1e-5], "f"))]


def run(template: Template, inputs: list[np.ndarray], cpu: Cpu | None = None) -> list[np.ndarray]:
    want = template.reference(*inputs)
    got = [aligned(np.full(w.shape, np.nan, np.float32)) for w in want]
    function(template, cpu)(*inputs, *got)
    return got


@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: t.symbol)
def test_against_float64(template: Template, name: str) -> None:
    call, rng = function(template, level(name)), np.random.default_rng()
    for rows, width in (*SHAPES, tuple(rng.integers(1, 300, 2))):
        inputs = arguments(template, rows, width, rng)
        want = template.reference(*inputs)
        got = [aligned(np.full(w.shape, np.nan, np.float32)) for w in want]
        call(*inputs, *got)
        for g, w in zip(got, want, strict=True):
            np.testing.assert_allclose(g, w, rtol=1e-6, atol=3e-6, err_msg=f"{rows} x {width}")


@pytest.mark.parametrize("mean", [1e3, -3e5])
@pytest.mark.parametrize("width", [7, 64, 768])
def test_a_large_mean_costs_no_accuracy(mean: float, width: int) -> None:
    template, rng = LayerNorm(), np.random.default_rng()
    inputs = arguments(template, 40, width, rng, mean)
    (got,) = run(template, inputs)
    np.testing.assert_allclose(got, template.reference(*inputs)[0], rtol=1e-6, atol=3e-6)


def test_equal_numbers_normalize_to_the_bias() -> None:
    rng = np.random.default_rng()
    inputs = arguments(LayerNorm(), 3, 33, rng)
    inputs[0][...] = np.array([[0.1], [1e6], [0.0]], np.float32)
    (got,) = run(LayerNorm(), inputs)
    # 0.1 has no exact mean in float32, and the square root of epsilon is all that the difference is divided by.
    np.testing.assert_allclose(got, np.broadcast_to(inputs[2], (3, 33)), atol=1e-4)


def test_a_sum_is_what_float32_gives_and_one_row_does_not_see_another() -> None:
    template, rng = LayerNorm(True, True), np.random.default_rng()
    inputs = arguments(template, 6, 100, rng)
    inputs[0][3] = np.nan
    got, total = run(template, inputs)
    np.testing.assert_array_equal(total, inputs[0] + inputs[1])
    assert np.isnan(got[3]).all() and np.isfinite(np.delete(got, 3, 0)).all()


def test_names_and_what_makes_no_sense() -> None:
    assert len({template.symbol for template in TEMPLATES}) == len(TEMPLATES)
    with pytest.raises(ValueError, match="keep_sum without residual"):
        RmsNorm(keep_sum=True)
