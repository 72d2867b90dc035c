"""Token merging on a GPU against the float64 reference; what it refuses, and how it is launched, without one."""

from __future__ import annotations

import math

import numpy as np
import pytest

from planish.ir.errors import InputError, UnsupportedError
from planish.ir.ops.merge_reference import reference
from planish.runtime.cuda import driver, toolchain

torch = pytest.importorskip("torch")

from planish.runtime.cuda import token_merge as kernels  # noqa: E402
from planish.runtime.cuda.attention import attention  # noqa: E402
from planish.runtime.cuda.token_merge import Norm, add_norm, launch_plan, merge_tokens  # noqa: E402
from tests.runtime.cuda.compilers import turing_alone  # noqa: E402
from tests.runtime.cuda.merge_margins import clear  # noqa: E402

gpu = pytest.mark.skipif(not driver.available() or toolchain.nvcc() is None, reason="no GPU, or no nvcc")
LIMITS = {"float16": 6e-4, "bfloat16": 5e-3, "float32": 1e-6}


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """What is made empty holds NaN, or -1."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def filled(item):
        return item.fill_(math.nan if item.is_floating_point() else 255 if item.dtype == torch.uint8 else -1)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: filled(empty(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: filled(new_empty(*a, **k)))


def tensors(batch, tokens, heads, size, width, dtype, seed=0, sized=True):
    random = np.random.default_rng(seed)
    x, keys = random.standard_normal((batch, tokens, width)), random.standard_normal((batch, tokens, heads, size))
    sizes = random.integers(1, 5, (batch, tokens)).astype("f4") if sized else np.ones((batch, tokens), "f4")
    made = (torch.tensor(item).to("cuda", getattr(torch, dtype)) for item in (x, keys))
    return *made, torch.tensor(sizes).cuda()


def expected(x, keys, sizes, max_norm=False, **attributes):
    flat = keys.flatten(2)
    arrays = (item.double().cpu().numpy() for item in (x, flat, sizes))
    return reference(False, max_norm)(*arrays, heads=keys.shape[2], **attributes)


def compare(got, want, limit, of=slice(None)):
    """All, or the images `of`."""
    y, merged, index, logs = (item.cpu().double().numpy() for item in got[:4])
    assert y.shape == want[0].shape and merged.shape == want[1].shape
    y, merged, index, logs = (item[of] for item in (y, merged, index, logs))
    want = [item[of] for item in want]
    assert np.array_equal(index, want[2])
    np.testing.assert_allclose(merged, want[1], rtol=1e-6)
    np.testing.assert_allclose(logs, np.log(want[1]), rtol=1e-6, atol=1e-6)
    assert np.isfinite(y).all()
    assert np.linalg.norm(y - want[0]) <= limit * np.linalg.norm(want[0])


CASES = [  # batch, tokens, heads, size, width, r, protected
    (3, 197, 12, 64, 768, 16, 1),
    (2, 197, 12, 64, 768, 0, 1),
    (2, 50, 4, 64, 128, 99, 1),
    (1, 577, 4, 80, 96, 64, 1),
    (2, 64, 1, 768, 40, 13, 0),
    (3, 33, 3, 20, 30, 7, 3),
    (2, 2, 1, 16, 8, 1, 0),
    (1, 1, 2, 8, 16, 4, 1),
    (2, 3, 2, 8, 16, 4, 5),
    (40, 40, 2, 64, 64, 9, 2),
    (20, 40, 2, 64, 64, 9, 2),
    (300, 12, 2, 8, 24, 3, 1),
    (0, 12, 2, 8, 24, 3, 1),
]


@gpu
@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize("case", CASES)
def test_merge(case, dtype):
    *shape, r, protected = case
    x, keys, sizes = tensors(*shape, dtype, seed=sum(case))
    got = merge_tokens(x, keys, sizes, r=r, protected=protected, logs=True)
    compare(got, expected(x, keys, sizes, r=r, protected=protected), LIMITS[dtype])


@gpu
@pytest.mark.parametrize("protected", [0, 1, 2])
def test_ties_go_to_the_lower_index(protected):
    # Four of 64 columns are 1 or -1, by few patterns: all similarities are multiples of 1/4, to the last bit.
    random = np.random.default_rng(protected)
    patterns = np.zeros((6, 64), "f4")
    for row in patterns:
        row[random.choice(8, 4, replace=False)] = random.choice([-1, 1], 4)
    keys = patterns[random.integers(0, 6, (5, 131))] * random.choice([0, 0.5, 1, 2], (5, 131, 1))
    x, _, sizes = tensors(5, 131, 1, 8, 48, "float16", sized=False)
    keys = torch.tensor(np.repeat(keys[:, :, None], 4, 2)).to("cuda", torch.float16)
    for r in (1, 20, 60):
        got = merge_tokens(x, keys, None, r=r, protected=protected, logs=True)
        compare(got, expected(x, keys, sizes, r=r, protected=protected), 6e-4)


@gpu
def test_equal_keys_are_equally_similar():
    """Whatever their place in a tile: every token has one of three keys, and goes to the first that has its own."""
    base = torch.randn(3, 6, 64, device="cuda", dtype=torch.float16)
    kind = torch.arange(150, device="cuda") // 2 % 3
    x, keys = torch.randn(1, 150, 32, device="cuda", dtype=torch.float16), base[kind][None]
    index = merge_tokens(x, keys, r=60)[2][0, ::2].cpu().numpy()
    goes, own = index >= 15, np.arange(75) % 3
    assert goes.sum() == 60 and (index[goes] == 15 + own[goes]).all()
    assert all((np.diff(goes[own == kind].astype(int)) <= 0).all() for kind in range(3))  # the first of a kind go


@gpu
def test_views_of_a_fused_product_and_no_sizes():
    qkv = torch.randn(4, 197, 3, 6, 64, device="cuda", dtype=torch.float16)
    x, keys = torch.randn(4, 200, 100, device="cuda", dtype=torch.float16)[:, 1:198, :96], qkv[:, :, 1]
    got = merge_tokens(x, keys, ratio=0.13, r=2, protected=1, logs=True)
    ones = torch.ones(4, 197, device="cuda")
    compare(got, expected(x, keys, ones, ratio=0.13, r=2, protected=1), 6e-4)
    assert merge_tokens(x, keys, r=1, index=False)[2:] == (None, None, None)


@gpu
@pytest.mark.parametrize("width", [64, 50])
def test_max_norm(width):
    x, keys, sizes = tensors(2, 61, 3, 32, width, "float32")
    got = merge_tokens(x, keys, sizes, r=25, protected=1, max_norm=True, logs=True)
    compare(got, expected(x, keys, sizes, max_norm=True, r=25, protected=1), 1e-6)


def clear_images(keys, **settings):
    """Those whose merging by energy no rounding decides."""
    found = clear(keys.flatten(2).double().cpu().numpy(), keys.shape[2], **settings)
    assert (~found).sum() <= 2 + len(found) // 10
    return found


@gpu
@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize("case", CASES)
def test_energy(case, dtype):
    *shape, r, protected = case
    x, keys, sizes = tensors(*shape, dtype, seed=sum(case))
    for max_norm in (False, True):
        settings = {"r": r, "protected": protected, "margin": 0.05, "alpha": 0.7, "max_norm": max_norm}
        got = merge_tokens(x, keys, sizes, logs=True, **settings)
        flat = keys.flatten(2)
        arrays = (item.double().cpu().numpy() for item in (x, flat, sizes))
        del settings["max_norm"]
        want = reference(True, max_norm)(*arrays, heads=keys.shape[2], **settings)
        compare(got, want, LIMITS[dtype], clear_images(keys, **settings))


@gpu
def test_equal_keys_have_equal_energies():
    """Ten tokens have one key, and so the highest energy: in order, five go into the first of the others."""
    keys = torch.randn(1, 40, 2, 32, device="cuda")
    keys[:, 5:15] = keys[:, 5:6]
    index = merge_tokens(torch.randn(1, 40, 16, device="cuda"), keys, r=5, margin=0.1)[2][0].tolist()
    assert index[:5] == [0, 1, 2, 3, 4] and [index[i] for i in (5, 7, 9, 11, 13)] == [5] * 5
    assert [index[i] for i in (6, 8, 10, 12, 14)] == [5, 6, 7, 8, 9]


@gpu
@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize("case", [case for case in CASES if case[0]] + [(2, 70, 16, 64, 512, 30, 1)])
def test_sum_and_norm(case, dtype):
    *shape, r, protected = case
    width = shape[4]
    if width == 768 and dtype == "float32":
        pytest.skip("wider than a warp has registers for")
    x, keys, sizes = tensors(*shape, dtype, seed=sum(case))
    added, gain, shift = (torch.randn(s, device="cuda").to(x.dtype) for s in (x.shape, width, width))
    for margin in (None, 0.1):
        got = merge_tokens(
            x,
            keys,
            sizes,
            r=r,
            protected=protected,
            logs=True,
            added=added,
            norm=Norm(gain, shift, 1e-6),
            margin=margin,
        )
        arrays = (
            item.cpu().numpy() for item in (x.double() + added.double(), keys.flatten(2).double(), sizes.double())
        )
        settings = {"r": r, "protected": protected, "heads": keys.shape[2]} | ({"margin": margin} if margin else {})
        want = reference(margin is not None, False)(*arrays, **settings)
        of = slice(None) if margin is None else clear_images(keys, r=r, protected=protected, margin=margin)
        compare(got, want, LIMITS[dtype], of)
        normal = torch.nn.functional.layer_norm(
            torch.tensor(want[0]).cuda(), (width,), gain.double(), shift.double(), 1e-6
        )
        assert (got.normed.double() - normal).norm() <= 2 * LIMITS[dtype] * normal.norm()
    y, normed = add_norm(x, added, Norm(gain, None))
    normal = torch.nn.functional.layer_norm(x.double() + added.double(), (width,), gain.double())
    assert (y.double() - x.double() - added.double()).norm() <= LIMITS[dtype] * y.double().norm()
    assert (normed.double() - normal).norm() <= 2 * LIMITS[dtype] * normal.norm()


@gpu
def test_net():
    """Layers with merging and proportional attention, in float16, against float64 that merges the same tokens."""
    generator = torch.Generator("cuda").manual_seed(0)

    def weight(*shape):
        return (torch.randn(shape, generator=generator, device="cuda") / math.sqrt(shape[0])).half()

    layers = [(weight(128, 384), weight(128, 128), weight(128, 256), weight(256, 128)) for _ in range(4)]
    start = torch.randn(3, 101, 128, generator=generator, device="cuda").half()
    x, exact = start, start.double()
    bias = sizes = None
    exact_sizes = torch.ones(3, 101, device="cuda", dtype=torch.float64)
    norm = torch.nn.functional.layer_norm
    for qkv, out, up, down in layers:
        q, k, v = (norm(x, (128,)) @ qkv).view(*x.shape[:2], 3, 2, 64).unbind(2)
        x = x + attention(q, k, v, causal=False, bias=bias).flatten(2) @ out
        x, sizes, index, bias, _ = merge_tokens(x, k, sizes, r=13, protected=1, logs=True)
        x = x + torch.relu(norm(x, (128,)) @ up) @ down

        q, k, v = (norm(exact, (128,)) @ qkv.double()).view(*exact.shape[:2], 3, 2, 64).unbind(2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 8 + exact_sizes.log()[:, None, None]
        mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)
        exact = exact + mixed @ out.double()
        total = torch.zeros(x.shape[:2], device="cuda", dtype=torch.float64).scatter_add(1, index, exact_sizes)
        share = (exact_sizes / total.gather(1, index))[..., None]
        exact = torch.zeros(x.shape, device="cuda", dtype=torch.float64).scatter_add(
            1, index[..., None].expand_as(exact), exact * share
        )
        exact_sizes = total
        exact = exact + torch.relu(norm(exact, (128,)) @ up.double()) @ down.double()
    assert x.shape == (3, 49, 128)
    assert ((sizes.double() - exact_sizes).abs().max()) < 1e-4
    assert ((x.double() - exact).norm() / exact.norm()) < 3e-3


@gpu
def test_graph():
    x, keys, sizes = tensors(2, 99, 2, 64, 128, "float16")
    want = merge_tokens(x, keys, sizes, r=20, logs=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = merge_tokens(x, keys, sizes, r=20, logs=True)
    graph.replay()
    assert all(torch.equal(one, two) for one, two in zip(got[:4], want[:4], strict=True))


@pytest.fixture
def turing(monkeypatch):
    """The form for Turing, on the GPU at hand: from its PTX, and launched as there."""
    yield from turing_alone(monkeypatch, kernels._kernel, chosen=True)


@gpu
def test_turing(turing):
    for case in CASES[:6]:
        *shape, r, protected = case
        x, keys, sizes = tensors(*shape, "float16", seed=sum(case))
        got = merge_tokens(x, keys, sizes, r=r, protected=protected, logs=True)
        compare(got, expected(x, keys, sizes, r=r, protected=protected), LIMITS["float16"])
    got = merge_tokens(x, keys, sizes, r=r, protected=protected, margin=0.1, logs=True)
    arrays = (item.double().cpu().numpy() for item in (x, keys.flatten(2), sizes))
    settings = {"r": r, "protected": protected, "margin": 0.1, "heads": keys.shape[2]}
    compare(got, reference(True, False)(*arrays, **settings), LIMITS["float16"])


def test_launch_plan():
    hopper, ampere = driver.Device(90, 132, 227 << 10), driver.Device(80, 108, 163 << 10)
    plan = launch_plan(64, 197, 64, "float16", hopper, r=16, protected=1)
    assert (plan.cluster, plan.count, plan.left, plan.defines) == (2, 16, 181, {"VALUE": 0, "FUSED": 0})
    assert plan.scratch_batch >= 197 * 64 * 4 + 98 * 8 and plan.scratch_batch % 16 == 0
    assert launch_plan(64, 197, 64, "bfloat16", ampere, r=16).cluster == 1
    assert [launch_plan(n, 50, 64, "float32", hopper, r=1).cluster for n in (1, 16, 33, 66, 67)] == [8, 8, 4, 2, 1]
    assert launch_plan(1, 8, 64, "float16", hopper, r=99, protected=1).count == 3
    for energy, most in ((False, kernels.MOST_TOKENS), (True, kernels.MOST_BY_ENERGY)):
        assert launch_plan(1, most, 64, "float16", ampere, r=4000, energy=energy).shared <= 48 << 10


def test_what_does_not_fit_is_refused():
    x = torch.zeros(1, 8, 16, dtype=torch.float16)
    with pytest.raises(InputError, match="x is on cpu"):
        merge_tokens(x, x[..., None, :])
    with pytest.raises(InputError, match="x has rank 3 and keys 3"):
        merge_tokens(x, x)
    device = driver.Device(90, 132, 227 << 10)
    with pytest.raises(UnsupportedError, match="merging 4000 tokens; the CUDA kernel takes at most 2720"):
        launch_plan(1, 4000, 64, "float16", device, r=1)
    with pytest.raises(UnsupportedError, match="merging tokens in float64"):
        launch_plan(1, 40, 64, "float64", device, r=1)
    with pytest.raises(InputError, match="r is -1"):
        launch_plan(1, 40, 64, "float16", device, r=-1)
    with pytest.raises(UnsupportedError, match="tokens of width 2048 with a layer norm; the CUDA kernel takes 1024"):
        wide = torch.zeros(1, 8, 2048, dtype=torch.float16)
        kernels._check_norm(wide, None, Norm(wide[0, 0]), False, True)
