"""Attention kernels on a GPU against float64; what they refuse is tested without one."""

from __future__ import annotations

import ctypes
import itertools
import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from planish.ir.errors import InputError, UnsupportedError
from planish.runtime.cuda import driver, toolchain

torch = pytest.importorskip("torch")

from planish.runtime.cuda import attention as kernels  # noqa: E402
from planish.runtime.cuda.attention import BlockLists, Workspace, attention, decode  # noqa: E402
from tests.runtime.cuda.compilers import turing_alone  # noqa: E402

gpu = pytest.mark.skipif(not driver.available() or toolchain.nvcc() is None, reason="no GPU, or no nvcc")


def reference(q, k, v, *, causal, mask=None, lengths=None, bias=None):
    """float64: (output, log-sum-exp); rows that see nothing are zeros and -inf."""
    q, k, v = (x.double() for x in (q, k, v))
    queries, keys, per = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(per, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[3])
    if bias is not None:
        scores = scores + bias.double()[:, None, None]
    sees = torch.ones(q.shape[0], q.shape[2], queries, keys, dtype=torch.bool, device=q.device)
    if causal:
        positions = torch.arange(queries, device=q.device) + keys - queries
        sees &= torch.arange(keys, device=q.device)[None, :] <= positions[:, None]
    if mask is not None:
        sees &= mask
    if lengths is not None:
        sees &= (torch.arange(keys, device=q.device) < lengths[:, None].long())[:, None, None]
    scores = scores.masked_fill(~sees, -math.inf)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - torch.where(lse.isinf(), 0.0, lse)[..., None])
    return torch.einsum("bhqk,bkhd->bqhd", weights, v), lse


def tensors(batch, queries, keys, heads, kv_heads, size, dtype, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    shapes = (batch, queries, heads, size), (batch, keys, kv_heads, size), (batch, keys, kv_heads, size)
    return tuple(torch.randn(shape, generator=generator, device="cuda").to(dtype) for shape in shapes)


def lists_of(mask: np.ndarray, head_layout: np.ndarray, block: int, shared: int = 1):
    """(layouts, rows, columns) of blocks → lists on the GPU."""
    indptr = np.concatenate([np.zeros((len(mask), 1), int), np.cumsum(mask.sum(2), axis=1)], axis=1)
    indptr += np.concatenate([[0], np.cumsum(mask.sum((1, 2)))[:-1]])[:, None]
    parts = (indptr, np.nonzero(mask)[2], head_layout)
    return BlockLists(*(torch.tensor(x.astype("i4"), device="cuda") for x in parts), block, shared)


def tokens(mask: np.ndarray, head_layout: np.ndarray, block: int, queries: int, keys: int, offset: int):
    dense = torch.tensor(mask[head_layout], device="cuda").repeat_interleave(block, 1).repeat_interleave(block, 2)
    return dense[None, :, offset : offset + queries, :keys]


def close(got, want, limit):
    assert torch.isfinite(got.float()).all()
    assert ((got.double() - want).norm() / want.norm()).item() < limit


LIMITS = {"float16": 1e-3, "bfloat16": 8e-3}


@gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(
    ("batch", "queries", "keys", "heads", "kv_heads", "causal"),
    [(2, 128, 128, 4, 4, True), (1, 1, 1, 2, 1, True), (2, 100, 333, 6, 2, True), (1, 257, 257, 2, 2, False),
     (3, 65, 200, 2, 1, False), (1, 1000, 1000, 4, 1, True), (1, 64, 191, 2, 2, True), (1, 1700, 1901, 2, 1, True),
     (2, 1600, 129, 3, 1, False)],
)  # fmt: skip
def test_dense(dtype, size, batch, queries, keys, heads, kv_heads, causal):
    q, k, v = tensors(batch, queries, keys, heads, kv_heads, size, getattr(torch, dtype))
    out = torch.full_like(q, math.nan)
    lse = torch.full((batch, heads, queries), math.nan, device="cuda")
    attention(q, k, v, causal=causal, out=out, lse=lse)
    want, want_lse = reference(q, k, v, causal=causal)
    close(out, want, LIMITS[dtype])
    assert (lse - want_lse).abs().max() < 1e-3


@gpu
@pytest.mark.parametrize("together", [False, True])  # by the kernel for Hopper, whatever the lists
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize(
    ("queries", "keys", "causal"),
    [(512, 512, True), (300, 300, True), (70, 450, True), (400, 700, False), (200, 450, True), (1, 64, True)],
)
def test_lists(block, queries, keys, causal, size, together, monkeypatch):
    monkeypatch.setattr(BlockLists, "together", together)
    monkeypatch.setattr(kernels, "APART_FROM", {64: 1, 128: 1})
    random = np.random.default_rng(queries + block)
    blocks = -(-keys // block)
    mask = random.random((3, blocks, blocks)) < 0.4
    mask[:, np.arange(blocks), np.arange(blocks)] |= random.random((3, blocks)) < 0.7  # some rows see nothing
    layout = np.array([0, 1, 2, 2, 1, 0])
    q, k, v = tensors(2, queries, keys, 6, 2, size, torch.float16)
    out, lse = torch.full_like(q, math.nan), torch.full((2, 6, queries), math.nan, device="cuda")
    lists = lists_of(mask, layout, block)
    attention(q, k, v, causal=causal, lists=lists, out=out, lse=lse)
    offset = keys - queries if causal else 0
    want, want_lse = reference(q, k, v, causal=causal, mask=tokens(mask, layout, block, queries, keys, offset))
    close(out, want, 1e-3)
    assert torch.equal(lse.isinf(), want_lse.isinf())
    assert (lse - want_lse)[~want_lse.isinf()].abs().max() < 1e-3


@gpu
def test_lengths_and_strides():
    q, k, v = tensors(3, 130, 130, 4, 2, 64, torch.float16)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))  # (batch, heads, tokens, size)
    lengths = torch.tensor([130, 64, 1], dtype=torch.int32, device="cuda")
    close(attention(q, k, v, causal=True, lengths=lengths), reference(q, k, v, causal=True, lengths=lengths)[0], 1e-3)


@gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "size", "causal"),
    [(3, 197, 12, 64, False), (2, 65, 2, 64, False), (1, 1, 2, 64, False), (2, 11, 3, 64, False),
     (1, 300, 2, 128, True), (2, 577, 2, 64, True), (2, 1700, 1, 64, True), (1, 500, 1, 128, False)],
)  # fmt: skip
def test_bias(dtype, batch, tokens, heads, size, causal):
    qkv = torch.randn(batch, tokens, 3, heads, size, device="cuda").to(getattr(torch, dtype))
    bias = torch.randn(batch, tokens + 3, device="cuda")[:, 1 : tokens + 1] * 2  # aligned to 4 bytes
    if tokens > 100:
        bias[:, 60:140] = -math.inf  # a whole tile
    if causal:
        bias[:, 0] = 0  # a query sees one key at least
    out = torch.full((batch, tokens, heads, size), math.nan, device="cuda", dtype=qkv.dtype)
    lse = torch.full((batch, heads, tokens), math.nan, device="cuda")
    attention(*qkv.unbind(2), causal=causal, bias=bias, out=out, lse=lse)
    want, want_lse = reference(*qkv.unbind(2), causal=causal, bias=bias)
    close(out, want, LIMITS[dtype])
    assert (lse - want_lse).abs().max() < 1e-3


@gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(
    ("batch", "keys", "heads", "kv_heads"),
    [(1, 1, 2, 2), (2, 777, 8, 8), (1, 5000, 8, 2), (3, 64, 8, 1), (1, 20000, 32, 4)],
)
def test_decode(dtype, size, batch, keys, heads, kv_heads):
    q, k, v = tensors(batch, 1, keys, heads, kv_heads, size, getattr(torch, dtype))
    workspace = Workspace()
    for _ in range(2):  # the second time with what the first left in the workspace
        out = decode(q, k, v, workspace, out=torch.full_like(q, math.nan))
        close(out, reference(q, k, v, causal=True)[0], LIMITS[dtype])


@gpu
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("shared", [1, 2])
def test_decode_lists(block, shared):
    random = np.random.default_rng(block)
    keys = 1500
    blocks = -(-keys // block)
    mask = random.random((3, blocks, blocks)) < 0.4
    mask[2, -1] = False  # heads that see nothing
    layout = np.array([0, 0, 1, 1, 2, 2])
    q, k, v = tensors(2, 1, keys, 6, 3, 128, torch.float16)
    lists = lists_of(mask, layout, block, shared)
    out = decode(q, k, v, Workspace(), lists=lists, out=torch.full_like(q, math.nan))
    close(out, reference(q, k, v, causal=True, mask=tokens(mask, layout, block, 1, keys, keys - 1))[0], 1e-3)
    assert (out[:, :, 4:] == 0).all()


def test_c_and_python_take_the_same_kernel():
    header = Path(kernels.__file__).with_name("native") / "launch_attention.h"
    assert f"(c->size == 64 ? {kernels.APART_FROM[64]} : {kernels.APART_FROM[128]})" in header.read_text()


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_c_and_python_split_keys_alike(tmp_path):
    source = tmp_path / "splits.c"
    source.write_text("""#include "launch_attention.h"
int splits(long batch, long heads, long keys, long size, int arch, int processors, int shared) {
  attention_call c;
  memset(&c, 0, sizeof c);
  c.batch = batch, c.heads = heads, c.keys = keys, c.size = size;
  return attention_splits(&c, arch, processors, shared);
}
""")
    library, headers = tmp_path / "splits.so", Path(kernels.__file__).with_name("native")
    subprocess.run(["cc", "-shared", "-fPIC", f"-I{headers}", "-o", library, source], check=True)
    found = ctypes.CDLL(str(library)).splits
    found.argtypes = [ctypes.c_long] * 4 + [ctypes.c_int] * 3
    for keys, size, (arch, processors), shared, batch in itertools.product(
        (1, 64, 700, 4096, 32768), (64, 128), ((75, 40), (80, 108), (90, 132)), (1, 4, 8), (1, 3, 50)
    ):
        blocks, tiles = batch * 32 // shared, -(-keys // 64)
        splits = kernels._splits(blocks, tiles, size, arch, processors)
        assert found(batch, 32, keys, size, arch, processors, shared) == max(1, min(splits, tiles, 64))


def test_what_does_not_fit_is_refused():
    q = torch.zeros(1, 4, 2, 64, dtype=torch.float16)
    with pytest.raises(InputError, match="q is on cpu"):
        attention(q, q, q)
    with pytest.raises(InputError, match="k has rank 3"):
        attention(q, q[0], q)
    with pytest.raises(UnsupportedError, match="blocks of 32 tokens; CUDA kernels take multiples of 64"):
        BlockLists(q, q, q, 32)


@pytest.fixture
def turing(monkeypatch):
    """The form for Turing, on the GPU at hand: from its PTX, and chosen as there."""
    yield from turing_alone(monkeypatch, kernels._prefill, kernels._decode, chosen=True)


@gpu
@pytest.mark.parametrize("size", [64, 128])
def test_turing(turing, size):
    q, k, v = tensors(2, 100, 333, 6, 2, size, torch.float16)
    close(attention(q, k, v, out=torch.full_like(q, math.nan)), reference(q, k, v, causal=True)[0], 1e-3)
    close(attention(q, k, v, causal=False), reference(q, k, v, causal=False)[0], 1e-3)
    bias = torch.randn(2, 333, device="cuda")
    close(attention(q, k, v, causal=False, bias=bias), reference(q, k, v, causal=False, bias=bias)[0], 1e-3)
    mask = np.random.default_rng(0).random((2, 6, 6)) < 0.5
    lists, layout = lists_of(mask, np.array([0, 1] * 3), 64), np.array([0, 1] * 3)
    want = reference(q, k, v, causal=True, mask=tokens(mask, layout, 64, 100, 333, 233))[0]
    close(attention(q, k, v, lists=lists), want, 1e-3)
    one = q[:, :1]
    close(decode(one, k, v, Workspace()), reference(one, k, v, causal=True)[0], 1e-3)
