from __future__ import annotations

import numpy as np
import pytest

from planish.passes.testing import check_declines, check_numerics, check_rewrite

HEAD = '<ir_version: 10, opset_import: ["" : 23]>'


def repeated(
    *,
    axis: int = 2,
    k_expand: str = "{1, 1, 2, 1, 1}",
    joined: str = "{0, 4, -1, 8}",
    v_dims: str = "[B, 2, L, 8]",
    v_expand: str = "{1, 1, 2, 1, 1}",
    inputs: str = "q, kr, vr",
    k_dims: str = "[B, 2, L, 8]",
    extra: str = "",
    outputs: str = "y",
) -> str:
    return f"""
    {HEAD}
    grouped (float[B, 4, S, 8] q, float{k_dims} k, float{v_dims} v{extra}) => (float[B, 4, S, 8] y)
    <int64[1] axis = {{{axis}}}, int64[5] ke = {k_expand}, int64[5] ve = {v_expand}, int64[4] joined = {joined}>
    {{
        ku = Unsqueeze(k, axis)
        kx = Expand(ku, ke)
        kr = Reshape(kx, joined)
        vu = Unsqueeze(v, axis)
        vx = Expand(vu, ve)
        vr = Reshape(vx, joined)
        {outputs} = Attention<scale = 0.25>({inputs})
    }}
    """


#: As torch writes it: the shapes are computed. Each length is named, so both are proved.
DYNAMIC = f"""
{HEAD}
grouped (float[B, 4, S, 8] q, float[B, 2, L, 8] k, float[B, 2, L, 8] v, bool[B, 1, S, L] mask) => (float[B, 4, S, 8] y)
<int64[1] axis = {{2}}, int64[1] two = {{2}}, int64[1] four = {{4}}, int64[1] eight = {{8}}>
{{
    b = Shape<start = 0, end = 1>(k)
    n = Shape<start = 2, end = 3>(k)
    wide = Concat<axis = 0>(b, two, two, n, eight)
    joined = Concat<axis = 0>(b, four, n, eight)
    ku = Unsqueeze(k, axis)
    kx = Expand(ku, wide)
    kr = Reshape(kx, joined)
    vu = Unsqueeze(v, axis)
    vx = Expand(vu, wide)
    vr = Reshape(vx, joined)
    y = Attention(q, kr, vr, mask)
}}
"""


def feeds(batch: int, queries: int, keys: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    q = rng.standard_normal((batch, 4, queries, 8), dtype=np.float32)
    k, v = rng.standard_normal((2, batch, 2, keys, 8), dtype=np.float32)
    return {"q": q, "k": k, "v": v}


def test_copies_go() -> None:
    after = f"""
    {HEAD}
    grouped (float[B, 4, S, 8] q, float[B, 2, L, 8] k, float[B, 2, L, 8] v, bool[B, 1, S, L] mask)
        => (float[B, 4, S, 8] y)
    {{ y = Attention(q, k, v, mask) }}
    """
    check_rewrite("share-kv-heads,eliminate-dead-code", DYNAMIC, after)


@pytest.mark.parametrize("size", [(1, 1, 1), (1, 5, 7), (3, 4, 4)])
def test_numbers(size: tuple[int, int, int]) -> None:
    mask = np.random.default_rng(1).random((size[0], 1, *size[1:])) > 0.4
    program = check_numerics("share-kv-heads", DYNAMIC, {**feeds(*size), "mask": mask})
    assert "Expand" not in {n.op_type for n in program.main.graph}


STATIC = repeated(joined="{3, 4, 6, 8}", k_dims="[3, 2, 6, 8]", v_dims="[3, 2, 6, 8]").replace("[B, 4, S", "[3, 4, S")


def test_static_sizes() -> None:
    check_numerics("share-kv-heads", STATIC, feeds(3, 5, 6))


DECLINES = {
    "batch or length of the keys may change": STATIC.replace("ke = {1, 1, 2, 1, 1}", "ke = {3, 1, 2, 1, 1}").replace(
        "[3, 2, 6, 8] k", "[1, 2, 6, 8] k"
    ),
    "keys have 2 heads and values have 1": STATIC.replace("[3, 2, 6, 8] v", "[3, 1, 6, 8] v").replace(
        "ve = {1, 1, 2, 1, 1}", "ve = {1, 1, 4, 1, 1}"
    ),
    "reads or writes a cache": STATIC.replace("y = Attention", "y, pk, pv = Attention"),
    "not repeated for 4 heads of queries": STATIC.replace("{1, 1, 2, 1, 1}", "{1, 1, 3, 1, 1}")
    .replace("{3, 4, 6, 8}", "{3, 6, 6, 8}")
    .replace("Attention<scale = 0.25>(q, kr, vr)", "Attention<scale = 0.25>(q, kr, vr)"),
}


@pytest.mark.parametrize("reason", DECLINES)
def test_declines(reason: str) -> None:
    check_declines("share-kv-heads", DECLINES[reason], reason)


def test_heads_put_together_the_other_way_are_no_repetition() -> None:
    from planish.passes.testing import check_untouched

    # Unsqueeze at axis 1 makes heads 0 1 0 1, where Attention means 0 0 1 1.
    check_untouched(
        "share-kv-heads", STATIC.replace("axis = {2}", "axis = {1}").replace("{1, 1, 2, 1, 1}", "{1, 2, 1, 1, 1}")
    )
