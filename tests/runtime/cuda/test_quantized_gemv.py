"""Products with quantized weights on a GPU against float64; what they refuse without one."""

from __future__ import annotations

import math

import numpy as np
import pytest

from planish.ir.errors import InputError, UnsupportedError
from planish.ir.ops.quantized_linear import unpack
from planish.passes.precision.blocks import round_to_nearest
from planish.runtime.cuda import driver, toolchain

torch = pytest.importorskip("torch")

from planish.runtime.cuda import quantized_gemv as kernels  # noqa: E402
from planish.runtime.cuda.quantized_gemv import launch_plan, quantized_gemv  # noqa: E402
from tests.runtime.cuda.compilers import turing_alone  # noqa: E402

gpu = pytest.mark.skipif(not driver.available() or toolchain.nvcc() is None, reason="no GPU, or no nvcc")


def check(x, codes, scales, weight, bits, added=None, zeros=None):
    """`weight`: what codes and scales stand for, of float64."""
    rows = len(x)
    out = torch.full((rows, len(weight)), math.nan, device="cuda", dtype=torch.float16)
    got = quantized_gemv(x, codes, scales, bits=bits, zeros=zeros, added=added, out=out)
    want = x.double() @ torch.tensor(weight).cuda().T
    if added is not None:
        want = want + added.double()
    assert got is out and torch.isfinite(got).all()
    # Against how large sums of such terms are, since a few may cancel.
    scale = (x.double().square() @ torch.tensor(weight).cuda().square().T).sqrt() + want.abs()
    limit = 3e-4 if want.numel() > 16 else 2.0**-11  # the rounding of the result: of many numbers, or of each
    assert ((got.double() - want).norm() / scale.norm()) < limit


def by_block(n, k, bits, block, seed=0):
    weight = np.random.default_rng(seed).standard_normal((n, k)).astype("f4") * 0.05
    made = round_to_nearest(weight, bits, block)
    scales = made.scales.astype("f2")
    exact = type(made)(made.codes, scales.astype("f4"), bits, block, k).weight().astype("f8")
    return torch.tensor(made.codes).cuda(), torch.tensor(scales).cuda(), exact


@gpu
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 2, 3, 8])
@pytest.mark.parametrize(
    ("n", "k", "block"),
    [(64, 256, 32), (100, 1000, 128), (17, 4096, 32), (1, 32, 16), (33, 96, 16), (300, 11008, 64), (48, 8, 32),
     (31, 520, 256)],
)  # fmt: skip
def test_blocks(bits, rows, n, k, block):
    codes, scales, weight = by_block(n, k, bits, block, seed=n)
    x = torch.randn(rows, k, device="cuda").half()
    check(x, codes, scales, weight, bits, torch.randn(n, device="cuda").half() if rows == 3 else None)


@gpu
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize(
    ("n", "k", "block"), [(64, 256, 32), (31, 1000, 128), (33, 96, 16), (2500, 1056, 32), (9, 4096, 16)]
)
def test_zeros(bits, rows, n, k, block):
    random, blocks = np.random.default_rng(n), -(-k // block)
    codes = random.integers(0, 256, (n, blocks, block * bits // 8)).astype("u1")
    zeros = random.integers(0, 256, (n, -(-blocks * bits // 8))).astype("u1")
    scales = random.uniform(1e-3, 1e-2, (n, blocks)).astype("f2")
    numbers = unpack(codes, bits) - unpack(zeros, bits)[:, :blocks, None].astype("f8")
    weight = (numbers * scales[..., None]).reshape(n, -1)[:, :k]
    given = (torch.tensor(array).cuda() for array in (codes, scales))
    check(torch.randn(rows, k, device="cuda").half(), *given, weight, bits, zeros=torch.tensor(zeros).cuda())


@gpu
@pytest.mark.parametrize("kind", ["uint8", "int8", "4 bits"])
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 40, 4096), (2, 7, 96), (8, 130, 2080), (5, 16, 32)])
def test_channels(kind, rows, n, k):
    random = np.random.default_rng(n)
    scales = random.random(n).astype("f4") * 1e-3
    if kind == "4 bits":
        codes = random.integers(0, 256, (n, k // 2)).astype("u1")
        numbers = np.stack([codes & 15, codes >> 4], -1).reshape(n, k).astype("f8") - 8
    else:
        codes = random.integers(0, 256, (n, k)).astype("u1").view(np.dtype(kind).str)
        numbers = codes.astype("f8") - (128 if kind == "uint8" else 0)
    x = torch.randn(rows, k, device="cuda").half()
    check(
        x, torch.tensor(codes).cuda(), torch.tensor(scales).cuda(), numbers * scales[:, None], 4 if "4" in kind else 8
    )


@pytest.fixture
def turing(monkeypatch):
    """The form for Turing, on the GPU at hand, from its PTX."""
    yield from turing_alone(monkeypatch, kernels._kernel, chosen=False)


@gpu
@pytest.mark.parametrize("bits", [4, 8])
def test_turing(turing, bits):
    codes, scales, weight = by_block(100, 1000, bits, 32)
    for rows in (1, 5):
        check(torch.randn(rows, 1000, device="cuda").half(), codes, scales, weight, bits)


def test_launch_plan():
    plan = launch_plan(1, 11008, 4096, 4, 32)
    assert (plan.grid, plan.threads) == (688, 128)
    assert [launch_plan(1, n, 4096, 4, 32).threads for n in (16, 4096, 6144, 8208)] == [384, 384, 256, 128]
    assert plan.defines == {"BITS": 4, "CHANNEL": 0, "FEW": 1, "GATED": 0, "ZEROS": 0}
    assert plan.sizes == (1, 11008, 4096, 128, 128, 5, 0)
    assert launch_plan(8, 17, 4096, 8, None, signed=True).sizes == (8, 17, 4096, 256, 1, 30, 1)
    assert launch_plan(1, 16, 1000, 4, 128).sizes[3:5] == (32, 8)
    few = [launch_plan(*given, zeros=True).defines["FEW"] for given in
           [(2, 16, 64, 4, 32), (3, 16, 64, 4, 32), (1, 16, 64, 4, 16), (2, 16, 64, 8, 16)]]  # fmt: skip
    assert few == [1, 0, 0, 1]


def test_what_does_not_fit_is_refused():
    with pytest.raises(UnsupportedError, match="9 rows; the kernel for quantized weights takes 1 to 8"):
        launch_plan(9, 16, 64, 4, 32)
    with pytest.raises(UnsupportedError, match="blocks of 24 codes; they must be a power of two"):
        launch_plan(1, 16, 64, 4, 24)
    with pytest.raises(UnsupportedError, match="16 columns, 16 codes of 4 bits: x and codes must be multiples of 16"):
        launch_plan(1, 16, 16, 4, 16)
    x = torch.zeros(1, 32, dtype=torch.float16)
    with pytest.raises(InputError, match="x is on cpu"):
        quantized_gemv(x, x, x, bits=4)
