from __future__ import annotations

import numpy as np
import pytest

from planish.passes.testing import (
    check_declines,
    check_numerics,
    check_rewrite,
    check_untouched,
    program_of,
    run_reference,
)

HEAD = '<ir_version: 10, opset_import: ["" : 23]>'
LOWEST = "-3.4028234663852886e38"


def eager(
    steps: str,
    last: str = "scaled",
    *,
    extra: str = "",
    weights: str = "p = Softmax<axis = -1>(last)",
    keys: str = "kt = Transpose<perm = [0, 1, 3, 2]>(k)",
    shape: str = "[B, 2, S, 8]",
    outputs: str = "float[B, 2, S, 8] y",
) -> str:
    """Attention as eager code writes it; `steps` lead from the product `qk` to the value `last`."""
    return f"""
    {HEAD}
    attention (float{shape} q, float[B, 2, L, 8] k, float[B, 2, L, 8] v{extra}) => ({outputs})
    <float scale = {{0.3}}, float lowest = {{{LOWEST}}}, float zero = {{0}}>
    {{
        {keys}
        qk = MatMul(q, kt)
        {steps}
        last = Identity({last})
        {weights}
        y = MatMul(p, v)
    }}
    """


PLAIN = eager("scaled = Mul(qk, scale)")
SDPA = f"""
{HEAD}
attention (float[B, 2, S, 8] q, float[B, 2, L, 8] k, float[B, 2, L, 8] v, bool[B, 1, S, L] mask)
    => (float[B, 2, S, 8] y)
<float half = {{0.5}}, float zero = {{0}}, float lowest = {{{LOWEST}}}, int64[1] minus1 = {{-1}},
 int64[1] minus2 = {{-2}}, int64[1] end = {{9223372036854775807}}, int64[1] begin = {{-9223372036854775808}}>
{{
    dims = Shape<start = 0>(k)
    depth = Slice(dims, minus1, end)
    length = Slice(dims, minus2, minus1)
    front = Slice(dims, begin, minus2)
    flat = Concat<axis = 0>(minus1, length, depth)
    k3 = Reshape(k, flat)
    k3t = Transpose<perm = [0, 2, 1]>(k3)
    full = Concat<axis = 0>(front, depth, length)
    kt = Reshape(k3t, full)
    qs = Mul(q, half)
    ks = Mul(kt, half)
    bias = Where(mask, zero, lowest)
    qk = MatMul(qs, ks)
    s = Add(qk, bias)
    p = Softmax<axis = -1>(s)
    nan = IsNaN(p)
    safe = Where(nan, zero, p)
    y = MatMul(safe, v)
}}
"""


def feeds(batch: int, queries: int, keys: int, seed: int = 0, **more: np.ndarray) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((batch, 2, queries, 8), dtype=np.float32)
    k, v = rng.standard_normal((2, batch, 2, keys, 8), dtype=np.float32)
    return {"q": q, "k": k, "v": v, **more}


SIZES = [(1, 1, 1), (1, 5, 7), (3, 4, 4), (3, 1, 9)]


def test_plain_becomes_one_node() -> None:
    after = f"""
    {HEAD}
    attention (float[B, 2, S, 8] q, float[B, 2, L, 8] k, float[B, 2, L, 8] v) => (float[B, 2, S, 8] y)
    {{ y = Attention<scale = 0.3>(q, k, v) }}
    """
    check_rewrite("fuse-attention", PLAIN, after, edits=1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "steps",
    ["scaled = Mul(qk, scale)", "scaled = Mul(scale, qk)", "scaled = Div(qk, scale)", "scaled = Identity(qk)"],
)
def test_scales(steps: str, size: tuple[int, int, int]) -> None:
    check_numerics("fuse-attention", eager(steps), feeds(*size))


@pytest.mark.parametrize(
    "keys",
    [
        "kt = Transpose<perm = [0, 1, 3, 2]>(k)",
        "ks = Mul(k, scale)\n kt = Transpose<perm = [0, 1, 3, 2]>(ks)",
        "k1 = Transpose<perm = [0, 1, 3, 2]>(k)\n kt = Div(k1, scale)",
        "apart = Transpose<perm = [0, 2, 1, 3]>(k)\n kt = Transpose<perm = [0, 2, 3, 1]>(apart)",
    ],
)
def test_ways_to_the_keys(keys: str) -> None:
    for size in SIZES:
        check_numerics("fuse-attention", eager("scaled = Identity(qk)", keys=keys), feeds(*size))


MASKS = {
    "full": "[B, 1, S, L]",
    "matrix": "[S, L]",
    "heads": "[2, S, L]",
    "keys": "[B, 1, 1, L]",
    "vector": "[L]",
    "row": "[1, L]",
    "other names": "[N, 1, M, K]",
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", MASKS)
def test_additive_masks_of_every_shape(kind: str, size: tuple[int, int, int]) -> None:
    batch, queries, keys = size
    sizes = {"B": batch, "S": queries, "L": keys, "N": batch, "M": queries, "K": keys}
    dims = [int(sizes.get(d, d)) for d in MASKS[kind].strip("[]").split(", ")]
    text = eager(
        "bias = Where(mask, zero, lowest)\n scores = Mul(qk, scale)\n scaled = Add(scores, bias)",
        extra=f", bool{MASKS[kind]} mask",
    )
    mask = np.random.default_rng(1).random(dims) > 0.3
    # Some rows are masked wholly: then the scores are all at the lowest float, and the weights are equal.
    if mask.ndim > 1:
        mask[..., 0, :] &= batch == 1
    check_numerics("fuse-attention", text, feeds(*size, mask=mask))


@pytest.mark.parametrize("size", SIZES)
def test_sdpa_of_torch_at_opset_18(size: tuple[int, int, int]) -> None:
    mask = np.random.default_rng(2).random((size[0], 1, *size[1:])) > 0.4
    mask[-1, :, 0] = False
    program = check_numerics("fuse-attention,eliminate-dead-code", SDPA, feeds(*size, mask=mask))
    assert [n.op_type for n in program.main.graph] == ["Where", "Max", "Attention"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("where", ["Where(mask, scores, fill)", "Where(mask, fill, scores)"])
@pytest.mark.parametrize("fill", [LOWEST, "-10000.0", "-1e9"])
def test_filled_scores(fill: str, where: str, size: tuple[int, int, int]) -> None:
    text = eager(
        f"fill = Constant<value_float = {fill}>()\n scores = Mul(qk, scale)\n scaled = {where}",
        extra=", bool[B, 1, 1, L] mask",
    )
    mask = np.random.default_rng(3).random((size[0], 1, 1, size[2])) > 0.4
    mask[-1] = False
    check_numerics("fuse-attention", text, feeds(*size, mask=mask))


@pytest.mark.parametrize("where", ["Where(mask, scores, fill)", "Where(mask, fill, scores)"])
def test_guarded_infinities_become_a_bool_mask(where: str) -> None:
    text = eager(
        f"fill = Constant<value = float {{-inf}}>()\n scores = Mul(qk, scale)\n scaled = {where}",
        extra=", bool[B, 1, S, L] mask",
        weights="p0 = Softmax(last)\n nan = IsNaN(p0)\n p = Where(nan, zero, p0)",
    )
    mask = np.random.default_rng(4).random((3, 1, 4, 6)) > 0.4
    mask[0, 0, 1], mask[1, 0, 2] = False, True
    check_numerics("fuse-attention", text, feeds(3, 4, 6, mask=mask))


def test_guarded_additive_infinities() -> None:
    text = eager(
        "fill = Constant<value = float {-inf}>()\n bias = Where(mask, zero, fill)\n scaled = Add(qk, bias)",
        extra=", bool[B, 1, S, L] mask",
        weights="p0 = Softmax(last)\n nan = IsNaN(p0)\n p = Where(nan, zero, p0)",
    )
    mask = np.random.default_rng(4).random((3, 1, 4, 6)) > 0.4
    mask[0, 0, 1] = False
    check_numerics("fuse-attention", text, feeds(3, 4, 6, mask=mask))


def test_mask_of_a_torchscript_bert() -> None:
    text = eager(
        """one = Constant<value_float = 1.0>()
        axes = Constant<value_ints = [1, 2]>()
        wide = Unsqueeze(attention_mask, axes)
        number = Cast<to = 1>(wide)
        off = Sub(one, number)
        bias = Mul(off, lowest)
        scores = Div(qk, scale)
        scaled = Add(scores, bias)""",
        extra=", int64[B, L] attention_mask",
    )
    ids = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    check_numerics("fuse-attention", text, feeds(3, 4, 5, attention_mask=ids))


def test_relative_positions_and_padding_are_one_sum() -> None:
    text = eager(
        """table = Constant<value = float[3, 2] {0.5, -1.0, 2.0, 0.25, -0.75, 1.5}>()
        bias = Gather(table, buckets)
        heads_first = Transpose<perm = [2, 0, 1]>(bias)
        axes = Constant<value_ints = [0]>()
        position = Unsqueeze(heads_first, axes)
        padding = Where(mask, zero, lowest)
        both = Add(qk, position)
        scaled = Add(both, padding)""",
        extra=", int64[S, L] buckets, bool[B, 1, 1, L] mask",
    )
    rng = np.random.default_rng(5)
    more = {"buckets": rng.integers(0, 3, (4, 6)), "mask": rng.random((3, 1, 1, 6)) > 0.3}
    more["mask"][1] = False
    program = check_numerics("fuse-attention", text, feeds(3, 4, 6, **more))
    assert "Softmax" not in {n.op_type for n in program.main.graph}


def test_layers_share_the_length_of_an_input() -> None:
    text = f"""
    {HEAD}
    attention (float[B, S, 16] x, bool[B, 1, 1, S] mask) => (float[B, 2, S, 8] y)
    <int64[4] heads = {{0, 0, 2, 8}}, float zero = {{0}}, float lowest = {{-10000}}>
    {{
        r = Reshape(x, heads)
        h = Transpose<perm = [0, 2, 1, 3]>(r)
        bias = Where(mask, zero, lowest)
        kt = Transpose<perm = [0, 2, 3, 1]>(r)
        s1 = MatMul(h, kt)
        t1 = Add(s1, bias)
        p1 = Softmax(t1)
        h2 = MatMul(p1, h)
        s2 = MatMul(h2, kt)
        t2 = Add(s2, bias)
        p2 = Softmax(t2)
        y = MatMul(p2, h)
    }}
    """
    mask = np.random.default_rng(6).random((3, 1, 1, 5)) > 0.3
    x = np.random.default_rng(6).standard_normal((3, 5, 16), dtype=np.float32)
    passes = "fuse-attention,eliminate-common-subexpressions,eliminate-dead-code"
    program = check_numerics(passes, text, {"x": x, "mask": mask})
    counts = [n.op_type for n in program.main.graph]
    assert counts.count("Attention") == 2
    assert counts.count("Shape") == 1 and counts.count("Expand") == 1


DECLINES = {
    "is over axis 1": eager("scaled = Mul(qk, scale)", weights="p = Softmax<axis = 1>(last)"),
    "not over a product": eager("scaled = Relu(qk)"),
    "scaled after they are masked": eager(
        "masked = Add(qk, mask)\n scaled = Mul(masked, scale)", extra=", float[B, 1, S, L] mask"
    ),
    "do not reach the product through a transpose": eager(
        "scaled = Mul(qk, scale)", keys="kt = Identity(kc)", extra=", float[B, 2, 8, L] kc"
    ),
    "filled with 0": eager("scaled = Where(mask, qk, zero)", extra=", bool[B, 1, S, L] mask"),
    "the order of additions matters": eager(
        "low = Constant<value_float = -10000.0>()\n bias = Where(mask, zero, low)\n first = Add(qk, scale)\n"
        "scaled = Add(first, bias)",
        extra=", bool[B, 1, S, L] mask",
    ),
    "used elsewhere": eager("scaled = Mul(qk, scale)", outputs="float[B, 2, S, 8] y, float[B, 2, S, L] p"),
    "takes positive scales": eager("minus = Constant<value_float = -0.5>()\n scaled = Mul(qk, minus)"),
    "differ in heads": eager("scaled = Mul(qk, scale)", shape="[B, 4, S, 8]", outputs="float[B, 4, S, 8] y").replace(
        "[B, 2, L, 8]", "[B, 1, L, 8]"
    ),
    "heads is unknown": eager("scaled = Mul(qk, scale)", shape="[B, H, S, 8]", outputs="float[B, H, S, 8] y").replace(
        "[B, 2, L, 8]", "[B, H, L, 8]"
    ),
    "the mask has rank 5": eager(
        "bias = Where(mask, zero, lowest)\n scaled = Add(qk, bias)",
        extra=", bool[1, 1, 1, S, L] mask",
        outputs="float[1, B, 2, S, 8] y",
    ),
    "not float32": eager("scaled = Mul(qk, scale)")
    .replace("float[", "double[")
    .replace("<float", "<double")
    .replace(", float", ", double"),
    "needs opset 23": PLAIN.replace('"" : 23', '"" : 22'),
}


@pytest.mark.parametrize("reason", DECLINES)
def test_declines(reason: str) -> None:
    check_declines("fuse-attention", DECLINES[reason], reason)


def test_other_products_are_no_business_of_it() -> None:
    check_untouched(
        "fuse-attention",
        f"""{HEAD}
        f (float[A, B] x, float[B, C] w) => (float[A, C] y) {{ y = MatMul(x, w) }}""",
    )


def test_why_masks_at_the_lowest_float_are_raised() -> None:
    # If this fails, ONNX Runtime's kernel has changed its mind and mask_values.ALMOST_LOWEST may go.
    text = f"""
    {HEAD}
    f (float[1, 1, 1, 2] q, float[1, 1, 3, 2] k, float[1, 1, 3, 2] v, float[1, 3] mask) => (float[1, 1, 1, 2] y)
    {{ y = Attention(q, k, v, mask) }}
    """
    v = np.arange(6, dtype=np.float32).reshape(1, 1, 3, 2)
    inputs = {"q": np.ones((1, 1, 1, 2), np.float32), "k": v, "v": v}
    results = [
        run_reference(program_of(text), {**inputs, "mask": np.full((1, 3), fill, np.float32)})["y"].ravel()
        for fill in (np.finfo(np.float32).min, -3.3e38)
    ]
    assert results[0].tolist() == [0.0, 0.0] and results[1].tolist() == [2.0, 3.0]
