"""Row by row on a GPU against float64; what is refused without one."""

from __future__ import annotations

import math

import pytest

from planish.ir.errors import InputError
from planish.runtime.cuda import driver, toolchain

torch = pytest.importorskip("torch")

from planish.runtime.cuda import rows  # noqa: E402
from tests.runtime.cuda.compilers import turing_alone  # noqa: E402

gpu = pytest.mark.skipif(not driver.available() or toolchain.nvcc() is None, reason="no GPU, or no nvcc")
LIMITS = {"float16": 5e-4, "bfloat16": 4e-3}


def random(seed, *sizes, dtype="float16"):
    made = torch.randn(sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.to(getattr(torch, dtype)).cuda()


def off(got, want):
    assert torch.isfinite(got).all()
    return float((got.double() - want).norm() / want.norm())


@pytest.fixture
def poison(monkeypatch):
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(math.nan))


@gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 8), (3, 7, 40), (5, 2048), (33, 2056), (2, 9, 4096), (7, 8192)])
@pytest.mark.parametrize("pair", [False, True])
def test_add_rms_norm(dtype, shape, pair, poison):
    x, a, b = (random(i, *shape, dtype=dtype) for i in range(3))
    weight = random(3, shape[-1], dtype=dtype)
    sums = x.double() + a.double() + (b.double() if pair else 0)
    want = sums / (sums.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight.double()
    for total in (True, False):
        y, t = rows.add_rms_norm(x, a, b if pair else None, weight, 1e-3, total)
        assert off(y, want) < LIMITS[dtype]
        assert (t is None) != total and (t is None or off(t, sums) < LIMITS[dtype])
    if pair:
        out = torch.full_like(x, math.nan)
        assert rows.add(x, a, b, out) is out and off(out, sums) < LIMITS[dtype] and torch.equal(rows.add(x, a, b), out)
    if pair:  # both ranks have the same bits
        other = rows.add_rms_norm(x, b, a, weight, 1e-3)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip((y, other[1]), (other[0], other[1]), strict=True))
    assert rows.add_rms_norm(x[:0], a[:0], None, weight)[0].shape == x[:0].shape


@gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(1,), (7, 9), (3, 2048), (5, 5504), (0, 8)])
def test_swiglu(dtype, shape, poison):
    gate, up = (3 * random(i, *shape, dtype=dtype) for i in range(2))
    got, wide = rows.swiglu(gate, up), gate.double()
    if gate.numel():
        assert off(got, wide * torch.sigmoid(wide) * up.double()) < LIMITS[dtype]


@pytest.fixture
def turing(monkeypatch):
    """The form for Turing, on the GPU at hand, from its PTX."""
    yield from turing_alone(monkeypatch, rows._norm, rows._gate, chosen=False)


@gpu
def test_turing(turing):
    x, a, b, weight = (random(i, *shape) for i, shape in enumerate([(5, 2056)] * 3 + [(2056,)]))
    sums = x.double() + a.double() + b.double()
    want = sums / (sums.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight.double()
    assert off(rows.add_rms_norm(x, a, b, weight, 1e-3)[0], want) < LIMITS["float16"]
    assert off(rows.swiglu(x, a), x.double() * torch.sigmoid(x.double()) * a.double()) < LIMITS["float16"]


def test_what_has_no_kernel():
    x = torch.ones(2, 8)
    assert not rows.fits(x)
    with pytest.raises(InputError, match="have no kernel"):
        rows.add_rms_norm(x, x, None, x[0])
    with pytest.raises(InputError, match="have no kernel"):
        rows.add(x, x, x)
    with pytest.raises(InputError, match="do not fit each other"):
        rows.swiglu(x, x)
