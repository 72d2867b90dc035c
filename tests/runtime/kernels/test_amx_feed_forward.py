"""Feed-forward networks in bfloat16 on AMX, and the activations that they and others may use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm")

from planish.ir.errors import InputError
from planish.runtime.kernels import amx, tir_math
from planish.runtime.kernels.amx_feed_forward import FeedForward
from planish.runtime.kernels.amx_gemm import pack
from planish.runtime.kernels.cpu import Cpu
from planish.runtime.kernels.loops import argument, prim_func, size
from planish.runtime.kernels.template import Template, aligned, function
from tests.runtime.kernels.tiles import require_tiles

#: (M, K, F, N): empty ones, one, whole tiles, none whole, several blocks of rows.
SHAPES = ((0, 3, 3, 3), (3, 0, 4, 5), (3, 4, 0, 5), (3, 4, 5, 0), (1, 1, 1, 1), (32, 64, 96, 32), (33, 40, 70, 50))
LARGE = ((193, 20, 33, 17), (400, 33, 31, 65))


@pytest.fixture(autouse=True)
def _tiles() -> None:
    require_tiles()


def operands(gated: bool, m: int, k: int, f: int, n: int) -> list[np.ndarray]:
    rng = np.random.default_rng()

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    first = [pack(normal(k, f) / np.float32(max(k, 1) ** 0.5)) for _ in range(1 + gated)]
    second = pack(normal(f, n) / np.float32(max(f, 1) ** 0.5))
    made = [normal(m, k), *first, *([] if gated else [normal(f)]), second, normal(n), normal(m, n)]
    return [aligned(array) for array in made]


@pytest.mark.parametrize(
    "template", [FeedForward("gelu"), FeedForward("silu", True), FeedForward("relu")], ids=lambda t: t.symbol
)
def test_against_float64(template: FeedForward) -> None:
    run = function(template)
    for shape in (*SHAPES, *LARGE):
        inputs = operands(template.gated, *shape)
        y = aligned(np.full((shape[0], shape[3]), np.nan, np.float32))
        run(*inputs, y)
        want = template.reference(*inputs)
        # The hidden layer is rounded from float32 here and from float64 there: half a step of bfloat16 at times.
        assert np.all(np.isfinite(y)) and np.allclose(y, want, rtol=4e-3, atol=2e-2), shape
        # Of a handful of hidden values one may be a step of bfloat16 off; of many, few are.
        assert np.linalg.norm(y - want) <= (1e-3 if shape[2] > 5 else 4e-3) * np.linalg.norm(want), shape


def test_unknown_activation() -> None:
    with pytest.raises(InputError, match="unknown activation 'gelo'"):
        FeedForward("gelo")


@dataclass(frozen=True)
class Apply(Template):
    """A function of `amx` on an array whose size is a multiple of 16."""

    name: str

    @property
    def symbol(self) -> str:
        return f"apply_{self.name}"

    def cpu(self) -> Cpu:
        return amx.amx("a test")

    def reference(self, *arguments: np.ndarray) -> Any:
        return None

    def build(self, cpu: Cpu) -> Any:
        with prim_func(self.symbol) as built:
            import tvm.tirx as tx
            from tvm.tirx.script.builder import ir as T

            n = size()
            x, y = argument("x", (n,)), argument("y", (n,))
            act = amx.exp2 if self.name == "exp2" else amx.ACTIVATIONS[self.name]
            with T.serial(n // 16) as i:
                T.buffer_store(y, act(x.vload([i * 16], "float32x16")), [tx.Ramp(i * 16, 1, 16)])
        return built[0]


def applied(name: str, x: np.ndarray) -> np.ndarray:
    y = aligned(np.full_like(x, np.nan))
    function(Apply(name))(aligned(x), y)
    return y


@pytest.mark.parametrize("name", sorted(amx.ACTIVATIONS))
def test_activations_are_closer_than_bfloat16(name: str) -> None:
    x = np.linspace(-12, 12, 1 << 14, dtype=np.float32)
    got, want = applied(name, x), tir_math.REFERENCES[name](x.astype(np.float64))
    # Relative where a result counts; far below zero, absolute.
    assert np.all(np.abs(got - want) <= 2.0**-9 * np.abs(want) + 2e-7)
    special = np.array([np.nan, np.inf, 1e30, 3e38, -1e30, -3e38, -100, 0, *[1] * 8], np.float32)
    got = applied(name, special)
    assert np.isnan(got[0]) and got[1] == np.inf and got[7] == 0
    assert np.allclose(got[2:4], special[2:4], rtol=1e-3) and not np.any(np.abs(got[4:7]) > 1e-20)


def test_exp2() -> None:
    x = np.linspace(-125, 100, 1 << 14, dtype=np.float32)
    want = np.exp2(x.astype(np.float64))
    assert np.all(np.abs(applied("exp2", x) - want) <= 1e-4 * want)
    special = np.array([-np.inf, np.nan, 0, 1, -1, 5, -1e30, 200, *[0] * 8], np.float32)
    got = applied("exp2", special)
    assert got[0] == 0 and np.isnan(got[1]) and np.array_equal(got[2:6], [1, 2, 0.5, 32])
    assert got[6] == 0 and got[7] == np.inf
