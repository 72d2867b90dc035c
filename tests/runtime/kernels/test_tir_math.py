"""Elementary functions as TIR expressions against float64: over the range, at its ends, in vectors and scalars."""

import math

import numpy as np
import pytest

from planish.runtime.kernels import tir_math
from planish.runtime.kernels.loops import argument, prim_func, size
from planish.runtime.kernels.template import aligned, target
from tests.runtime.kernels.levels import VECTORS, level

tvm = pytest.importorskip("tvm")

REFERENCES = {
    **tir_math.REFERENCES,
    "exp": np.exp,
    "exp_nonpositive": np.exp,
    "erf": np.vectorize(math.erf, otypes=[np.float64]),
}
#: Largest relative errors over [-5, inf) and over [-20, -5): tails below are a number near zero.
LIMITS = {
    "gelu": (4e-6, None),
    "gelu_tanh": (4e-6, None),
    "quick_gelu": (8e-7, 4e-6),
    "exp": (4.2e-7, 4.2e-7),
    "silu": (4e-7, 4e-7),
    "sigmoid": (4e-7, 4e-7),
}


def compiled(name: str, vectors: str, scalar: bool):
    """The function over an array, in vectors or number by number (which LLVM may vectorize itself)."""
    import tvm.tirx as tx
    from tvm.tirx.script.builder import ir as T

    cpu = level(vectors)
    lanes = 1 if scalar else cpu.lanes
    function = getattr(tir_math, name)
    with prim_func("f") as built:
        n = size()
        x, y = argument("x", (n,)), argument("y", (n,))
        with T.serial(n // lanes) as i:
            if scalar:
                T.buffer_store(y, function(x[i]), [i])
            else:
                vector = x.vload([i * lanes], f"float32x{lanes}")
                T.buffer_store(y, function(vector), [tx.Ramp(i * lanes, 1, lanes)])
    module = tvm.compile(tvm.IRModule({"f": built[0]}), target=target(cpu)).mod

    def call(values: np.ndarray) -> np.ndarray:
        padded = aligned(np.concatenate([values, np.zeros(-len(values) % lanes, np.float32)]).astype(np.float32))
        out = aligned(np.zeros_like(padded))
        module["f"](tvm.runtime.from_dlpack(padded), tvm.runtime.from_dlpack(out))
        return out[: len(values)]

    return call, module


def points() -> np.ndarray:
    rng = np.random.default_rng()
    return np.concatenate(
        [
            rng.uniform(-8, 8, 20_000),
            rng.uniform(-90, 90, 10_000),
            *(sign * np.logspace(-37, 38, 3_000) for sign in (-1, 1)),
            np.array([0.0, 1, -1, 0.625, -0.625, 88.722, -87.33, 1e-45, -1e-45]),
        ]
    ).astype(np.float32)


@pytest.mark.parametrize("scalar", [False, True], ids=["vector", "scalar"])
@pytest.mark.parametrize("vectors", VECTORS)
@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_against_float64(name, vectors, scalar):
    call, _ = compiled(name, vectors, scalar)
    x = points()
    if name == "exp_nonpositive":
        x = -np.abs(x)
    y = call(x).astype(np.float64)
    with np.errstate(all="ignore"):
        expected = REFERENCES[name](x.astype(np.float64))
        relative = np.abs(y - expected) / np.abs(expected)
    near, far = LIMITS.get(name, (4e-7, 4e-7))
    normal = (np.abs(expected) > 1.18e-38) & (np.abs(expected) < np.finfo(np.float32).max)
    assert relative[normal & (x >= -5)].max() <= near
    if name.startswith(("gelu", "quick_gelu")):
        assert relative[normal & (x >= -1)].max() <= 7e-7
    if far is not None:
        assert relative[normal & (x >= -20)].max() <= far
    # What is left of the tail is nothing beside the numbers around it.
    below = x < -5
    if name.startswith("exp"):
        assert relative[normal].max() <= 4.2e-7
    else:
        assert np.abs(y - expected)[below].max() <= 1e-9 + 4e-7 * np.abs(expected[below]).max()
    assert (np.abs(y[expected == 0]) <= 1e-20).all()


@pytest.mark.parametrize("vectors", VECTORS)
@pytest.mark.parametrize(
    "name, at_minus_inf, at_inf",
    [
        ("exp", 0, math.inf),
        ("erf", -1, 1),
        ("tanh", -1, 1),
        ("sigmoid", 0, 1),
        ("relu", 0, math.inf),
        ("gelu", 0, math.inf),
        ("gelu_tanh", 0, math.inf),
        ("silu", 0, math.inf),
        ("quick_gelu", 0, math.inf),
    ],
)
def test_ends_of_the_range(name, at_minus_inf, at_inf, vectors):
    call, _ = compiled(name, vectors, False)
    y = call(np.array([-math.inf, math.inf, math.nan, -3.4e38, 3.4e38, -104, 104], np.float32))
    assert y[[0, 3]] == pytest.approx(at_minus_inf, abs=1e-20)
    assert y[1] == at_inf
    assert math.isnan(y[2])
    assert y[4] == pytest.approx(min(at_inf, 3.4e38) if name != "exp" else at_inf)
    assert y[5] == pytest.approx(at_minus_inf, abs=1e-20)
    assert y[6] == pytest.approx({"exp": math.inf}.get(name, min(at_inf, 104)))


@pytest.mark.parametrize("vectors", ["avx2", "avx512"])
def test_products_and_sums_are_fused(vectors):
    """The polynomials' accuracy, and their speed, rest on it."""
    _, module = compiled("gelu", vectors, False)
    register = "%zmm" if vectors == "avx512" else "%ymm"
    lines = [line for line in module.inspect_source("asm").splitlines() if register in line]
    assert sum("vfm" in line or "vfnm" in line for line in lines) >= 15
