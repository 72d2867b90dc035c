"""Packed float32 products with their epilogues against float64, on every level that this processor has."""

import numpy as np
import pytest

pytest.importorskip("tvm")

from planish.ir.errors import InputError
from planish.runtime.kernels import tir_math
from planish.runtime.kernels.gemm import GatedGemm, Gemm, PackWeight, pack, panel_width, tile, unpack
from planish.runtime.kernels.template import aligned, function
from tests.runtime.kernels.levels import VECTORS, level

#: (M, N, K): empty, one, whole tiles, one more and one less, all remainders of rows, several blocks of rows.
SHAPES = (
    (0, 3, 3),
    (3, 0, 2),
    (4, 5, 0),
    (1, 1, 1),
    (1, 100, 37),
    (2, 47, 4),
    (3, 49, 5),
    (5, 16, 18),
    (7, 48, 64),
    (8, 96, 33),
    (9, 97, 31),
    (15, 50, 7),
    (257, 33, 20),
    (300, 65, 70),
)


def shapes(rng: np.random.Generator) -> list[tuple[int, int, int]]:
    return [*SHAPES, *(tuple(int(v) for v in rng.integers(1, 150, 3)) for _ in range(4))]


def operands(rng: np.random.Generator, m: int, n: int, k: int, width: int) -> dict[str, np.ndarray]:
    """Random inputs, and y full of NaN: an element that is not written shows."""

    def normal(*shape: int) -> np.ndarray:
        return aligned(rng.standard_normal(shape).astype("f"))

    scale = np.float32(1 / max(k, 1) ** 0.5)
    return {
        "x": normal(m, k),
        "w": aligned(pack(normal(k, n) * scale, width)),
        "v": aligned(pack(normal(k, n) * scale, width)),
        "b": normal(n),
        "r": normal(m, n),
        "y": aligned(np.full((m, n), np.nan, "f")),
    }


def gemms() -> list[Gemm]:
    plain = [Gemm(activation) for activation in (None, *sorted(tir_math.ACTIVATIONS))]
    return [*plain, Gemm(None, True), Gemm("gelu", True)]


@pytest.mark.parametrize("vectors", VECTORS)
@pytest.mark.parametrize("template", gemms(), ids=lambda t: t.symbol)
def test_gemm(template, vectors):
    cpu, rng = level(vectors), np.random.default_rng()
    run = function(template, cpu)
    for m, n, k in shapes(rng):
        a = operands(rng, m, n, k, panel_width(cpu))
        inputs = [a["x"], a["w"], a["b"], *([a["r"]] if template.residual else [])]
        run(*inputs, a["y"])
        np.testing.assert_allclose(a["y"], template.reference(*inputs), rtol=2e-6, atol=4e-6, err_msg=f"{m} {n} {k}")


@pytest.mark.parametrize("vectors", VECTORS)
@pytest.mark.parametrize("template", [GatedGemm(), GatedGemm("gelu_tanh"), GatedGemm(None)], ids=lambda t: t.symbol)
def test_gated_gemm(template, vectors):
    cpu, rng = level(vectors), np.random.default_rng()
    run = function(template, cpu)
    for m, n, k in shapes(rng):
        a = operands(rng, m, n, k, panel_width(cpu))
        run(a["x"], a["w"], a["v"], a["y"])
        expected = template.reference(a["x"], a["w"], a["v"], a["y"])
        np.testing.assert_allclose(a["y"], expected, rtol=4e-6, atol=1e-5, err_msg=f"{m} {n} {k}")


@pytest.mark.parametrize("vectors", VECTORS)
@pytest.mark.parametrize("transposed", [False, True])
def test_pack_weight(transposed, vectors):
    cpu, rng = level(vectors), np.random.default_rng()
    run = function(PackWeight(transposed), cpu)
    for _, n, k in shapes(rng):
        weight = rng.standard_normal((k, n)).astype("f")
        expected = pack(weight, panel_width(cpu))
        packed = aligned(np.full_like(expected, np.nan))
        run(aligned(weight.T if transposed else weight), packed)
        np.testing.assert_array_equal(packed, expected)
        np.testing.assert_array_equal(unpack(packed, n), weight)


@pytest.mark.parametrize("vectors", VECTORS)
def test_values_that_are_not_numbers(vectors):
    cpu = level(vectors)
    a = operands(np.random.default_rng(), 9, 50, 6, panel_width(cpu))
    a["x"][4, 2], a["x"][7, 1] = np.nan, np.inf
    function(Gemm(), cpu)(a["x"], a["w"], a["b"], a["y"])
    wrong = ~np.isfinite(a["y"])
    assert wrong[[4, 7]].all() and not np.delete(wrong, [4, 7], axis=0).any()


@pytest.mark.parametrize("vectors", ["avx2", "avx512"])
def test_sums_stay_in_registers(vectors):
    """No vector is spilled in the inner loop of the largest tile, which is one multiply-add for each of its vectors."""
    import re

    from planish.runtime.kernels.template import compile_module

    cpu = level(vectors)
    shape = tile(cpu)
    lines = compile_module([Gemm()], cpu).inspect_source("asm").splitlines()
    register = "%zmm" if vectors == "avx512" else "%ymm"
    blocks, block = [], []
    for line in lines:
        if re.match(r"\.L\w+:", line):
            blocks.append(block)
            block = []
        block.append(line)
    fused = [sum("vfmadd" in line and register in line for line in b) for b in blocks]
    inner = blocks[int(np.argmax(fused))]
    assert max(fused) % (shape.rows * shape.vectors) == 0
    assert not [line for line in inner if register in line and "(%rsp)" in line]


def test_an_unknown_activation_is_refused():
    with pytest.raises(InputError, match="unknown activation 'swish'"):
        Gemm("swish")
