"""Products of rank 3: heads joined to the batch, heads next to the batch, and no heads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from planish.ir.printer import op_counts
from planish.passes.testing import apply_pass, check_declines, check_numerics, check_rewrite, program_of
from tests.passes.fusion.test_fuse_attention import HEAD, LOWEST, SIZES, feeds

INPUTS = "float[B, 2, S, 8] q, float[B, 2, L, 8] k, float[B, 2, L, 8] v"
CONSTANTS = f"""<float scale = {{0.3}}, float zero = {{0}}, float lowest = {{{LOWEST}}}, int64 two = {{2}},
 int64 i1 = {{1}}, int64[1] a0 = {{0}}, int64[1] last = {{-1}}, int64[1] heads = {{2}}, int64[1] depth = {{8}}>"""
SHAPES = """
    b = Shape<start = 0, end = 1>(q)
    s = Shape<start = 2, end = 3>(q)
    l = Shape<start = 2, end = 3>(k)
    b0 = Squeeze(b)
    n0 = Mul(b0, two)
    n = Unsqueeze(n0, a0)
"""
PARTED = "to4 = Concat<axis = 0>(b, heads, s, l)\n to3 = Concat<axis = 0>(n, s, l)\n qk4 = Reshape(qk, to4)\n"
# What is added to the scores, and where.
ADDED4 = PARTED + "scaled = Add(qk4, mask)\n"
ADDED3 = "scaled = Add(qk, mask)\n"


def bmm(
    steps: str = "scaled = Identity(qk)",
    *,
    extra: str = "",
    joined: str = "flat = Concat<axis = 0>(n, last, depth)",
    columns: str = "k3 = Reshape(k, flat)\n kt = Transpose<perm = [0, 2, 1]>(k3)",
    inputs: str = INPUTS,
    more: str = "",
    weights: str = "p = Softmax<axis = -1>(scaled)\n",
) -> str:
    """Attention as torch.bmm has it; `steps` lead from the product `qk` to `scaled`."""
    back = "w = Reshape(p, to3)" if "to3" in steps else "w = Identity(p)"
    return f"""
    {HEAD} attention ({inputs}{extra}) => (float[B, 2, S, 8] y{more}) {CONSTANTS}
    {{
        {SHAPES}
        {joined}
        q3 = Reshape(q, flat)
        {columns}
        v3 = Reshape(v, flat)
        qs = Mul(q3, scale)
        qk = MatMul(qs, kt)
        {steps}
        {weights}
        {back}
        o3 = MatMul(w, v3)
        to = Concat<axis = 0>(b, heads, s, depth)
        y = Reshape(o3, to)
    }}
    """


def test_joined_heads_become_one_node() -> None:
    after = f"""
    {HEAD} attention ({INPUTS}) => (float[B, 2, S, 8] y)
    {{ y = Attention<scale = 0.3>(q, k, v) }}
    """
    # One for the products, one for the Reshape back to what was reshaped.
    assert apply_pass("fuse-attention", program_of(bmm())).fired == 2
    check_rewrite("fuse-attention,eliminate-dead-code,remove-no-ops,eliminate-dead-code", bmm(), after)
    counts = op_counts(check_numerics("fuse-attention,eliminate-dead-code", bmm(), feeds(3, 4, 5)))
    assert counts == {"Attention": 1} or counts == {"Attention": 1, "Identity": 1}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "columns",
    [
        "k3 = Reshape(k, flat)\n kt = Transpose<perm = [0, 2, 1]>(k3)",
        "k4 = Transpose<perm = [0, 1, 3, 2]>(k)\n kto = Concat<axis = 0>(n, depth, last)\n kt = Reshape(k4, kto)",
        "kh = Transpose<perm = [0, 2, 1, 3]>(k)\n k4 = Transpose<perm = [0, 2, 3, 1]>(kh)\n"
        "kto = Concat<axis = 0>(n, depth, last)\n kt = Reshape(k4, kto)",
    ],
)
def test_ways_of_the_keys(columns: str, size: tuple[int, int, int]) -> None:
    program = check_numerics("fuse-attention", bmm(columns=columns), feeds(*size))
    assert "Softmax" not in op_counts(program)


def test_minus_one_beside_a_length() -> None:
    joined = "flat = Concat<axis = 0>(last, l, depth)"
    program = check_numerics(
        "fuse-attention", bmm(joined=joined, inputs=INPUTS.replace("S, 8] q", "L, 8] q")), feeds(3, 4, 4)
    )
    assert op_counts(program)["Attention"] == 1 and "Softmax" not in op_counts(program)


MASKS = {
    "rank 4": (ADDED4, "[B, 1, S, L]"),
    "rank 4, by head": (ADDED4, "[B, 2, S, L]"),
    "rank 4, clamped": (PARTED + "sum = Add(qk4, mask)\n scaled = Max(sum, lowest)\n", "[B, 1, S, L]"),
    "rank 3, matrix": (ADDED3, "[S, L]"),
    "rank 3, shared": (ADDED3, "[1, S, L]"),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", MASKS)
def test_masks_with_rows_that_are_wholly_masked(kind: str, size: tuple[int, int, int]) -> None:
    steps, shape = MASKS[kind]
    sizes = {"B": size[0], "S": size[1], "L": size[2]}
    dims = [int(sizes.get(d, d)) for d in shape.strip("[]").split(", ")]
    text = bmm(steps, extra=f", float{shape} mask")
    rng = np.random.default_rng(3)
    for fill in (LOWEST, "-10000.0", "-inf"):
        mask = np.where(rng.random(dims) < 0.4, np.float32(fill), rng.standard_normal(dims).astype(np.float32))
        mask[..., 0, :] = np.float32(fill)
        program = check_numerics("fuse-attention", text, feeds(*size, mask=mask.astype(np.float32)))
        assert "Softmax" not in op_counts(program)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("clamped", [True, False])
def test_masks_of_known_values(clamped: bool, size: tuple[int, int, int]) -> None:
    steps = "m = Where(mask, zero, lowest)\n both = Add(m, m)\n" + PARTED + "sum = Add(qk4, both)\n"
    steps += "scaled = Max(sum, lowest)\n" if clamped else "scaled = Identity(sum)\n"
    mask = np.random.default_rng(4).random((size[0], 1, size[1], size[2])) > 0.4
    mask[0, 0, 0] = False
    program = check_numerics("fuse-attention", bmm(steps, extra=", bool[B, 1, S, L] mask"), feeds(*size, mask=mask))
    counts = op_counts(program)
    # Twice the lowest float is -inf, of which a whole row is NaN unless it is clamped.
    assert ("Attention" in counts) == clamped and "Softmax" not in counts


def alibi(steps: str = "") -> str:
    """Slopes times positions, added at rank 3 with heads joined to the batch, and a mask at rank 4."""
    return bmm(
        """slopes = Constant<value = float[2, 1] {0.5, 0.25}>()
        count = CumSum(ids, i1)
        position = Cast<to = 1>(count)
        axes = Constant<value_ints = [1]>()
        row = Unsqueeze(position, axes)
        bias4 = Mul(slopes, row)
        one = Constant<value_ints = [1]>()
        flat_bias = Concat<axis = 0>(n, one, l)
        bias = Reshape(bias4, flat_bias)
        biased = Add(qk, bias)
        to4 = Concat<axis = 0>(b, heads, s, l)
        to3 = Concat<axis = 0>(n, s, l)
        qk4 = Reshape(biased, to4)
        m = Where(mask, zero, lowest)
        scaled = Add(qk4, m)""",
        extra=", int64[B, L] ids, bool[B, 1, S, L] mask",
    )


@pytest.mark.parametrize("size", SIZES)
def test_alibi_at_rank_3(size: tuple[int, int, int]) -> None:
    mask = np.random.default_rng(4).random((size[0], 1, size[1], size[2])) > 0.4
    mask[0, 0, 0] = False
    more = {"ids": np.ones((size[0], size[2]), np.int64), "mask": mask}
    program = check_numerics("fuse-attention", alibi(), feeds(*size, **more))
    assert op_counts(program)["Attention"] == 1 and "Softmax" not in op_counts(program)


def one_head(steps: str = "t = Mul(qk, scale)", extra: str = "", perm: str = "0, 2, 1") -> str:
    return f"""
    {HEAD} f (float[B, S, 8] q, float[B, L, 8] k, float[B, L, 8] v{extra}) => (float[B, S, 8] y) {CONSTANTS}
    {{ kt = Transpose<perm = [{perm}]>(k) qk = MatMul(q, kt) {steps} p = Softmax(t) y = MatMul(p, v) }}
    """


def one_feeds(batch: int, queries: int, keys: int, **more: Any) -> dict[str, Any]:
    return {name: v[:, 0] for name, v in feeds(batch, queries, keys).items()} | more


def test_one_head() -> None:
    after = f"""
    {HEAD} f (float[B, S, 8] q, float[B, L, 8] k, float[B, L, 8] v) => (float[B, S, 8] y)
    {{ y = Attention<scale = 0.3, q_num_heads = 1, kv_num_heads = 1>(q, k, v) }}
    """
    check_rewrite("fuse-attention", one_head(), after, edits=1)
    for size in SIZES:
        check_numerics("fuse-attention", one_head(), one_feeds(*size))


@pytest.mark.parametrize("shape", ["[B, S, L]", "[S, L]", "[1, S, L]", "[L]", "[B, 1, L]"])
def test_masks_of_one_head(shape: str) -> None:
    text = one_head("u = Mul(qk, scale) t = Add(u, mask)", f", float{shape} mask")
    for size in SIZES:
        dims = [int({"B": size[0], "S": size[1], "L": size[2]}.get(d, d)) for d in shape.strip("[]").split(", ")]
        for fill in (LOWEST, "-inf", "-10000.0"):
            mask = np.zeros(dims, np.float32)
            mask[..., : dims[-1] // 2 + 1] = np.float32(fill)
            program = check_numerics("fuse-attention", text, one_feeds(*size, mask=mask))
            assert "Softmax" not in op_counts(program)
    filled = one_head("u = Mul(qk, scale) t = Where(mask, u, lowest)", f", bool{shape} mask")
    for size in SIZES:
        dims = [int({"B": size[0], "S": size[1], "L": size[2]}.get(d, d)) for d in shape.strip("[]").split(", ")]
        mask = np.random.default_rng(1).random(dims) > 0.5
        check_numerics("fuse-attention", filled, one_feeds(*size, mask=mask))


def test_added_zeros_are_no_mask() -> None:
    steps = """b = Shape<start = 0, end = 2>(q)
        l = Shape<start = 1, end = 2>(k)
        s = Concat<axis = 0>(b, l)
        nothing = ConstantOfShape(s)
        none = Mul(nothing, zero)
        u = Mul(qk, scale)
        t = Add(u, none)"""
    program = check_numerics("fuse-attention,eliminate-dead-code", one_head(steps), one_feeds(3, 4, 5))
    assert op_counts(program) == {"Attention": 1}


CUT = f"""
{HEAD} f (float[S, B, 16] q, float[L, B, 16] k, float[L, B, 16] v) => (float[S, B, 16] y) {CONSTANTS}
{{
    b = Shape<start = 1, end = 2>(q)
    b0 = Squeeze(b)
    n0 = Mul(b0, two)
    n = Unsqueeze(n0, a0)
    s = Shape<start = 0, end = 1>(q)
    l = Shape<start = 0, end = 1>(k)
    qto = Concat<axis = 0>(s, n, depth)
    kto = Concat<axis = 0>(l, n, depth)
    q3 = Reshape(q, qto)
    qt = Transpose<perm = [1, 0, 2]>(q3)
    k3 = Reshape(k, kto)
    kt = Transpose<perm = [1, 2, 0]>(k3)
    v3 = Reshape(v, kto)
    vt = Transpose<perm = [1, 0, 2]>(v3)
    qs = Mul(qt, scale)
    qk = MatMul(qs, kt)
    p = Softmax<axis = -1>(qk)
    o = MatMul(p, vt)
    ot = Transpose<perm = [1, 0, 2]>(o)
    hidden = Constant<value_ints = [16]>()
    to = Concat<axis = 0>(s, b, hidden)
    y = Reshape(ot, to)
}}
"""


@pytest.mark.parametrize("size", SIZES)
def test_heads_cut_next_to_the_batch(size: tuple[int, int, int]) -> None:
    batch, queries, keys = size
    rng = np.random.default_rng(0)
    inputs = {n: rng.standard_normal((s, batch, 16), dtype=np.float32) for n, s in zip("qkv", (queries, keys, keys))}  # noqa: B905
    passes = "fuse-attention,infer-shapes,simplify-shapes,remove-no-ops,compose-views,eliminate-dead-code"
    program = check_numerics(
        passes + ",merge-attention-heads,compose-views,remove-no-ops,eliminate-dead-code", CUT, inputs
    )
    counts = op_counts(program)
    # (length, batch, hidden) to (batch, length, hidden) and back; no copy per head.
    assert (counts["Attention"], counts["Transpose"]) == (1, 4) and "Softmax" not in counts


OTHER = "float[B, 2, S, 8] q, float[B, 2, L, 8] k, float[M, 4, L, 8] v"
DECLINES = {
    "used elsewhere": bmm(more=", float[N, S, L] p"),
    "is not seen to part scores": bmm(
        ADDED4.replace("(b, heads, s, l)", "(heads, b, s, l)"), extra=", float[1, 1, S, L] mask"
    ),
    "not of as many heads": bmm(ADDED4, extra=", float[B, 1, S, L] mask", inputs=OTHER).replace(
        "v3 = Reshape(v, flat)", "vflat = Concat<axis = 0>(last, l, depth)\n v3 = Reshape(v, vflat)"
    ),
    "not seen to be batch times heads": bmm(
        ADDED4,
        extra=", float[B, 1, S, L] mask, float[N, L, 8] vv",
    ).replace("Reshape(v, flat)", "Identity(vv)"),
    "is not seen to be a mask": bmm(ADDED3, extra=", float[N, S, L] mask"),
    "clamped at -5": bmm("low = Constant<value_float = -5.0>()\n scaled = Max(qk, low)"),
    "masked after they are clamped": bmm("c = Max(qk, lowest)\n scaled = Add(c, mask)", extra=", float[S, L] mask"),
    "do not reach the product through a transpose": one_head().replace(
        "kt = Transpose<perm = [0, 2, 1]>(k)", "kt = Reshape(k, swapped)"
    ).replace("<float scale", "<int64[3] swapped = {0, 8, -1}, float scale"),
}  # fmt: skip


@pytest.mark.parametrize("reason", DECLINES)
def test_declines(reason: str) -> None:
    check_declines("fuse-attention", DECLINES[reason], reason)
