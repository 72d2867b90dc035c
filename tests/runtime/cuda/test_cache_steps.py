"""What writes one token behind caches and attends to them: the kernels alone, in the form of a GPU and in Turing's."""

from __future__ import annotations

import ctypes
import math

import pytest

from planish.runtime.cuda import driver, toolchain
from planish.runtime.cuda.cache import module

torch = pytest.importorskip("torch")

from tests.runtime.cuda.compilers import turing_alone  # noqa: E402
from tests.runtime.cuda.test_rows import random  # noqa: E402

pytestmark = pytest.mark.skipif(not driver.available() or toolchain.nvcc() is None, reason="no GPU, or no nvcc")
FORMS = {"float32": {"ELEMENT_F32": 1}, "float16": {}, "bfloat16": {"ELEMENT_BF16": 1}}
LIMITS = {"float32": 2e-6, "float16": 5e-4, "bfloat16": 4e-3}
forms = pytest.mark.parametrize("form", ["its own", "Turing's"], indirect=True)
dtypes = pytest.mark.parametrize(  # Turing has no bfloat16
    ("form", "dtype"),
    [("its own", dtype) for dtype in FORMS] + [("Turing's", "float32"), ("Turing's", "float16")],
    indirect=["form"],
)
#: Tokens that a row holds; what is not within the capacity of 300 is cut to it.
HELD = [0, 1, 37, 255, 299, 400, -3]
CAPACITY = 300


class Step(ctypes.Structure):
    """Parameters of cache_step.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "new_k", "new_v", "k", "v", "out", "lengths", "done")),
        *((name, ctypes.c_int) for name in ("heads", "kv_heads", "capacity", "window")),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


class Append(ctypes.Structure):
    """Parameters of step_append.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("k", "v", "to_k", "to_v", "lengths", "totals")),
        ("capacity", ctypes.c_longlong),
        ("kv_heads", ctypes.c_int),
        ("chunks", ctypes.c_int),
    )


@pytest.fixture
def form(request, monkeypatch):
    """Kernels for the GPU at hand, or the PTX for Turing, which its driver translates."""
    if request.param == "its own":
        yield
    else:
        yield from turing_alone(monkeypatch, chosen=False)


def caches(heads, size, dtype):
    """(new key, new value, keys, values, tokens of each row): caches have NaN where no token is."""
    rows = len(HELD)
    new = [random(seed, rows, heads, size, dtype=dtype) for seed in (1, 2)]
    kept = [random(seed, rows, heads, CAPACITY, size, dtype=dtype) for seed in (3, 4)]
    for cache in kept:
        for row, held in enumerate(HELD):
            cache[row, :, max(held, 0) :] = math.nan
    return *new, *kept, torch.tensor(HELD, dtype=torch.int32, device="cuda")


def appended(cache, new, cut):
    """The cache with the new tokens; where a row is not within the capacity: at its end if `cut`, else nowhere."""
    want = cache.clone()
    for row, held in enumerate(HELD):
        if cut or 0 <= held < CAPACITY:
            want[row, :, min(max(held, 0), CAPACITY - 1)] = new[row]
    return want


def same(got, want):
    return torch.equal(got.isnan(), want.isnan()) and torch.equal(got.nan_to_num(), want.nan_to_num())


def attended(q, keys, values, window, softcap, scale):
    """Attention of one token a row in float64, (rows, heads, size)."""
    made = torch.zeros(q.shape, dtype=torch.float64, device="cuda")
    share = q.shape[1] // keys.shape[1]
    for row, held in enumerate(HELD):
        total = min(max(held, 0), CAPACITY - 1) + 1
        first = max(0, total - window) if window else 0
        k, v = (x[row, :, first:total].double().repeat_interleave(share, 0) for x in (keys, values))
        scores = torch.einsum("hd,htd->ht", q[row].double(), k) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        made[row] = torch.einsum("ht,htd->hd", scores.softmax(-1), v)
    return made


def parameters(q, new_k, new_v, keys, values, lengths, out=None, done=None, window=0, scale=0.0, softcap=0.0):
    tensors = (q, new_k, new_v, keys, values, out, lengths, done)
    pointers = (None if item is None else item.data_ptr() for item in tensors)
    return Step(*pointers, q.shape[1], keys.shape[1], CAPACITY, window, scale, softcap)


def launched(source, name, grid, threads, given, **macros):
    module(source, 0, **macros).function(name).launch(grid, threads, 0, given)
    torch.cuda.synchronize()


@dtypes
@pytest.mark.parametrize(("size", "heads", "kv_heads"), [(64, 4, 2), (80, 3, 3), (128, 8, 1)])
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (33, 0.0), (0, 5.0), (1, 0.0)])
def test_cache_step(form, dtype, size, heads, kv_heads, window, softcap):
    new_k, new_v, keys, values, lengths = caches(kv_heads, size, dtype)
    q = random(5, len(HELD), heads, size, dtype=dtype)
    want_k, want_v = appended(keys, new_k, cut=True), appended(values, new_v, cut=True)
    want, scale = attended(q, want_k, want_v, window, softcap, size**-0.5), size**-0.5
    out = torch.full_like(q, math.nan)
    given = parameters(q, new_k, new_v, keys, values, lengths, out, window=window, scale=scale, softcap=softcap)
    launched("cache_step.cu", "cache_step", (heads, len(HELD), 1), 256, given, HEAD=size, **FORMS[dtype])
    assert same(keys, want_k) and same(values, want_v)
    for row in range(len(HELD)):
        got = out[row].double()
        assert torch.isfinite(got).all() and float((got - want[row]).norm() / want[row].norm()) < LIMITS[dtype]


@dtypes
def test_cache_append(form, dtype):
    new_k, new_v, keys, values, lengths = caches(2, 80, dtype)
    done = torch.full((len(HELD), 6), 9, dtype=torch.int32, device="cuda")
    want_k, want_v = appended(keys, new_k, cut=False), appended(values, new_v, cut=False)
    given = parameters(random(5, len(HELD), 6, 80, dtype=dtype), new_k, new_v, keys, values, lengths, done=done)
    launched("cache_step.cu", "cache_append", (2, len(HELD), 1), 128, given, HEAD=80, **FORMS[dtype])
    assert same(keys, want_k) and same(values, want_v) and not done.any()


@forms
@pytest.mark.parametrize(("heads", "size"), [(2, 64), (3, 128)])
def test_step_append(form, heads, size):
    new_k, new_v, keys, values, lengths = caches(heads, size, "float16")
    totals = torch.full((len(HELD),), -1, dtype=torch.int32, device="cuda")
    want_k, want_v = appended(keys, new_k, cut=False), appended(values, new_v, cut=False)
    pointers = (item.data_ptr() for item in (new_k, new_v, keys, values, lengths, totals))
    launched("step_append.cu", "step_append", (heads, len(HELD), 1), 32, Append(*pointers, CAPACITY, heads, size // 8))
    assert same(keys, want_k) and same(values, want_v)
    assert totals.tolist() == [min(max(held, 0), CAPACITY - 1) + 1 for held in HELD]
