"""Masks of unknown values, and several masking steps: the meaning of every row stays, NaN included."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from planish.ir.program import Program
from planish.passes.testing import check_declines, check_numerics, check_rewrite, program_of, run_reference
from tests.passes.fusion.test_fuse_attention import HEAD, LOWEST, SIZES, eager, feeds

GUARD = "p0 = Softmax(last)\n nan = IsNaN(p0)\n p = Where(nan, zero, p0)"
ADDED = "scores = Mul(qk, scale)\n scaled = Add(scores, mask)"
MASK = ", bool[B, 1, S, L] mask"
ABSORBING = [(LOWEST, LOWEST), (LOWEST, "-10000.0"), ("-10000.0", LOWEST), ("-1e9", "-1e9")]
LOW = float(np.finfo(np.float32).min)


def operators(program: Program) -> set[str]:
    return {n.op_type for n in program.main.graph}


def masks(shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Rows of all kinds: free, partly and wholly at each low value, and at two of them."""
    rng = np.random.default_rng(7)
    bias = rng.standard_normal(shape).astype(np.float32)
    yield bias
    for fill in (-np.inf, LOW, -3.35e38, -1e9, -10000.0):
        for share in (0.4, 1.0):
            yield np.where(rng.random(shape) < share, np.float32(fill), bias)
    yield np.where(rng.random(shape) < 0.5, np.float32(-np.inf), np.float32(LOW))
    yield np.where(rng.random(shape) < 0.5, np.float32(-3.35e38), np.float32(LOW))


@pytest.mark.parametrize("weights", ["p = Softmax<axis = -1>(last)", GUARD])
@pytest.mark.parametrize("shape", ["[B, 1, S, L]", "[B, 2, S, L]", "[S, L]", "[B, 1, 1, L]", "[1, L]"])
def test_a_mask_that_is_an_input_keeps_its_meaning(shape: str, weights: str) -> None:
    text = eager(ADDED, extra=f", float{shape} mask", weights=weights)
    for size in SIZES:
        batch, queries, keys = size
        dims = [int({"B": batch, "S": queries, "L": keys}.get(d, d)) for d in shape.strip("[]").split(", ")]
        for mask in masks(tuple(dims)):
            program = check_numerics("fuse-attention", text, feeds(*size, mask=mask))
            assert "MultiHeadAttention" in operators(program) and "Softmax" not in operators(program)


def test_an_empty_batch() -> None:
    text = eager(ADDED, extra=", float[B, 1, S, L] mask")
    check_numerics("fuse-attention", text, feeds(0, 3, 4, mask=np.zeros((0, 1, 3, 4), np.float32)))


def test_before_and_after() -> None:
    after = f"""
    {HEAD.replace(" : 23", ' : 23, "com.microsoft" : 1')}
    attention (float[B, 2, S, 8] q, float[B, 2, L, 8] k, float[B, 2, L, 8] v, float[B, 1, S, L] mask)
        => (float[B, 2, S, 8] y) <int64[3] join = {{0, 0, 16}}, int64[4] split = {{0, 0, 2, 8}}>
    {{
        qt = Transpose<perm = [0, 2, 1, 3]>(q)
        q3 = Reshape(qt, join)
        kt = Transpose<perm = [0, 2, 1, 3]>(k)
        k3 = Reshape(kt, join)
        vt = Transpose<perm = [0, 2, 1, 3]>(v)
        v3 = Reshape(vt, join)
        o = com.microsoft.MultiHeadAttention<num_heads = 2, scale = 0.3>(q3, k3, v3, , , mask)
        o4 = Reshape(o, split)
        y = Transpose<perm = [0, 2, 1, 3]>(o4)
    }}
    """
    check_rewrite("fuse-attention", eager(ADDED, extra=", float[B, 1, S, L] mask"), after, edits=1)


def test_no_copy_stays_around_it_where_heads_were_split() -> None:
    text = f"""
    {HEAD} f (float[B, S, 16] x, float[B, 1, S, S] mask) => (float[B, S, 16] y)
    <int64[4] heads = {{0, 0, 2, 8}}, int64[3] joined = {{0, 0, 16}}>
    {{
        r = Reshape(x, heads)
        h = Transpose<perm = [0, 2, 1, 3]>(r)
        kt = Transpose<perm = [0, 2, 3, 1]>(r)
        s = MatMul(h, kt)
        m = Add(s, mask)
        p = Softmax(m)
        o = MatMul(p, h)
        t = Transpose<perm = [0, 2, 1, 3]>(o)
        y = Reshape(t, joined)
    }}
    """
    rng = np.random.default_rng(8)
    feed = {"x": rng.standard_normal((3, 5, 16), dtype=np.float32), "mask": next(masks((3, 1, 5, 5)))}
    passes = "fuse-attention,infer-shapes,compose-views,remove-no-ops,eliminate-dead-code"
    assert operators(check_numerics(passes, text, feed)) == {"MultiHeadAttention"}


@pytest.mark.parametrize("weights", ["p = Softmax<axis = -1>(last)", GUARD])
@pytest.mark.parametrize("keep", [True, False])
def test_fills_with_infinity(weights: str, keep: bool) -> None:
    where = "Where(mask, qk, fill)" if keep else "Where(mask, fill, qk)"
    text = eager(
        f"fill = Constant<value = float {{-inf}}>()\n scaled = {where}",
        extra=", bool[B, 1, S, L] mask",
        weights=weights,
    )
    for size in SIZES:
        for share in (0.5, 2.0, -1.0):
            mask = np.random.default_rng(9).random((size[0], 1, *size[1:])) < share
            check_numerics("fuse-attention", text, feeds(*size, mask=mask))


STEPS = {
    "where, then add": "filled = Where(allowed, scores, fill)\n scaled = Add(filled, padding)",
    "add, then where": "padded = Add(scores, padding)\n scaled = Where(allowed, padded, fill)",
    "two wheres": "filled = Where(allowed, scores, fill)\n scaled = Where(mask, filled, fill)",
    "where, where, add": "f = Where(allowed, scores, fill)\n g = Where(mask, f, fill)\n scaled = Add(g, padding)",
}


def steps(kind: str, fill: str, low: str, weights: str = "p = Softmax<axis = -1>(last)") -> str:
    return eager(
        f"""fill = Constant<value_float = {fill}>()
        low = Constant<value_float = {low}>()
        padding = Where(mask, zero, low)
        scores = Mul(qk, scale)
        {STEPS[kind]}""",
        extra=", bool[S, L] allowed, bool[B, 1, 1, L] mask",
        weights=weights,
    )


def padded(size: tuple[int, int, int]) -> Iterator[dict[str, np.ndarray]]:
    """A causal mask with padding on the right, on the left, everywhere, and at random."""
    batch, queries, keys = size
    rng = np.random.default_rng(10)
    allowed = np.tril(np.ones((queries, keys), bool), keys - queries)
    for mask in (
        np.arange(keys) < max(1, keys - 1),
        np.arange(keys) >= keys // 2,
        np.zeros(keys, bool),
        rng.random(keys) < 0.5,
    ):
        yield feeds(*size, allowed=allowed, mask=np.broadcast_to(mask, (batch, 1, 1, keys)))


@pytest.mark.parametrize("weights", ["p = Softmax<axis = -1>(last)", GUARD])
@pytest.mark.parametrize(
    ("fill", "low"), [(LOWEST, LOWEST), (LOWEST, "-10000.0"), ("-10000.0", LOWEST), ("-1e9", "-1e9")]
)
@pytest.mark.parametrize("kind", STEPS)
def test_several_steps(kind: str, fill: str, low: str, weights: str) -> None:
    for size in [*SIZES, (2, 5, 5)]:
        for feed in padded(size):
            program = check_numerics("fuse-attention", steps(kind, fill, low, weights), feed)
            assert "Softmax" not in operators(program)


@pytest.mark.parametrize("kind", ["where, then add", "add, then where"])
def test_fills_that_do_not_absorb_beside_a_padding_that_does_not(kind: str) -> None:
    text = steps(kind, "-10000.0", "-10000.0")
    check_declines("fuse-attention", text, "a row with no key that passes both would mix scores and fills")


def test_a_causal_where_and_a_padding_that_is_an_input() -> None:
    text = eager(
        "filled = Where(allowed, qk, lowest)\n scaled = Add(filled, mask)",
        extra=", bool[S, L] allowed, float[B, 1, 1, L] mask",
    )
    for mask in masks((3, 1, 1, 4)):
        allowed = np.tril(np.ones((4, 4), bool))
        program = check_numerics("fuse-attention", text, feeds(3, 4, 4, mask=mask, allowed=allowed))
        assert "Softmax" not in operators(program)


def test_two_masks_that_are_inputs() -> None:
    text = eager("one = Add(qk, a)\n scaled = Add(one, b)", extra=", float[S, L] a, float[S, L] b")
    check_declines("fuse-attention", text, "nothing is known of the values of 'a'")


def test_other_runtimes_decline() -> None:
    text = eager(ADDED, extra=", float[B, 1, S, L] mask")
    program = program_of(text, "tvm-cpu")
    check_declines("fuse-attention", program, "the mask may hold -inf")


def test_depth_must_be_known() -> None:
    text = eager(ADDED, extra=", float[B, 1, S, L] mask", shape="[B, 2, S, D]", outputs="float[B, 2, S, D] y").replace(
        "[B, 2, L, 8]", "[B, 2, L, D]"
    )
    check_declines("fuse-attention", text, "the depth of the heads is unknown")


CAPPED = "a = Mul(qk, scale)\n b = Div(a, cap)\n c = Tanh(b)\n capped = Mul(c, cap)\n"
CAP = "cap = Constant<value_float = 2.5>()\n"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mask", ["", ", bool[B, 1, S, L] mask", ", bool[L] mask"])
def test_softcap(mask: str, size: tuple[int, int, int]) -> None:
    masked = "bias = Where(mask, zero, lowest)\n scaled = Add(capped, bias)" if mask else "scaled = Identity(capped)"
    batch, queries, keys = size
    shape = (batch, 1, queries, keys) if "S" in mask else (keys,)
    more = {"mask": np.random.default_rng(11).random(shape) < 0.6} if mask else {}
    feed = feeds(*size, **more)
    feed["q"] *= 4
    program = check_numerics("fuse-attention", eager(CAP + CAPPED + masked, extra=mask), feed)
    node = next(n for n in program.main.graph if n.op_type == "Attention")
    assert node.attributes.get_float("softcap") == pytest.approx(2.5)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (CAP + CAPPED + "scaled = Add(capped, mask)", "next to a softcap"),
        ("a = Add(qk, mask)\n scaled = Tanh(a)", "through a Tanh after they are masked"),
        ("a = Tanh(qk)\n scaled = Tanh(a)", "through a Tanh twice"),
        ("m = Constant<value_float = -2.0>()\n a = Tanh(qk)\n scaled = Mul(a, m)", "positive caps"),
    ],
)
def test_caps_that_decline(text: str, reason: str) -> None:
    check_declines("fuse-attention", eager(text, extra=", float[B, 1, S, L] mask"), reason)


def test_capped_and_masked_on_other_runtimes() -> None:
    text = eager(
        CAP + CAPPED + "bias = Where(mask, zero, lowest)\n scaled = Add(capped, bias)", extra=", bool[B, 1, S, L] mask"
    )
    check_declines("fuse-attention", program_of(text, "tvm-cpu"), "the order of ONNX Runtime's kernel")


def test_why_the_order_of_softcap_and_mask_is_taken_from_the_kernel() -> None:
    # If this fails, ONNX Runtime's kernel has changed its mind: it caps the scores, and then masks them.
    text = f"""
    {HEAD} f (float[1, 1, 1, 2] q, float[1, 1, 3, 2] k, float[1, 1, 3, 2] v, float[1, 3] mask) => (float[1, 1, 1, 2] y)
    {{ y = Attention<softcap = 2.0, scale = 1.0>(q, k, v, mask) }}
    """
    rng = np.random.default_rng(12)
    q, k, v = (rng.standard_normal((1, 1, n, 2)).astype(np.float32) * 3 for n in (1, 3, 3))
    mask = np.array([[0.0, -3.0, 1.0]], np.float32)
    scores = 2 * np.tanh(q @ k.swapaxes(-1, -2) / 2) + mask
    weights = np.exp(scores) / np.exp(scores).sum()
    got = run_reference(program_of(text), {"q": q, "k": k, "v": v, "mask": mask})["y"]
    np.testing.assert_allclose(got, weights @ v, rtol=1e-5)
