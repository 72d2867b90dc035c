from __future__ import annotations

import numpy as np
import pytest

from planish.passes.testing import check_declines, check_numerics, check_rewrite, check_untouched

HEAD = '<ir_version: 10, opset_import: ["" : 23]>'
CACHES = "float[B, 2, T, 8] pk, float[B, 2, T, 8] pv"


def step(
    *,
    axis: str = "axis = 2",
    attention: str = "Attention<scale = 0.3>(q, pk, pv)",
    extra: str = "",
    outputs: str = f"float[B, 4, S, 8] y, {CACHES}",
    more: str = "",
    keys: str = "past_k, k",
) -> str:
    return f"""
    {HEAD} decode (float[B, 4, S, 8] q, float[B, 2, S, 8] k, float[B, 2, S, 8] v,
                   float[B, 2, P, 8] past_k, float[B, 2, P, 8] past_v{extra}) => ({outputs})
    {{ pk = Concat<{axis}>({keys})  pv = Concat<{axis}>(past_v, v)  {more}  y = {attention} }}
    """


def feeds(batch: int, new: int, past: int, **more: np.ndarray) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"q": (4, new), "k": (2, new), "v": (2, new), "past_k": (2, past), "past_v": (2, past)}
    found = {name: rng.standard_normal((batch, *shape, 8), dtype=np.float32) for name, shape in shapes.items()}
    return found | more


SIZES = [(1, 1, 1), (1, 1, 9), (3, 1, 5), (2, 4, 3), (1, 3, 0)]  # the kernel refuses an empty batch in either form


def test_before_and_after() -> None:
    after = f"""
    {HEAD} decode (float[B, 4, S, 8] q, float[B, 2, S, 8] k, float[B, 2, S, 8] v,
                   float[B, 2, P, 8] past_k, float[B, 2, P, 8] past_v) => (float[B, 4, S, 8] y, {CACHES})
    {{ y, pk, pv = Attention<scale = 0.3>(q, k, v, , past_k, past_v) }}
    """
    for axis in ("axis = 2", "axis = -2"):
        check_rewrite("fuse-kv-cache", step(axis=axis), after, edits=1)


@pytest.mark.parametrize("outputs", [f"float[B, 4, S, 8] y, {CACHES}", "float[B, 4, S, 8] y"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["", "float", "bool"])
def test_numbers(kind: str, size: tuple[int, int, int], outputs: str) -> None:
    batch, new, past = size
    extra = f", {kind}[B, 1, S, T] mask" if kind else ""
    attention = "Attention<scale = 0.3>(q, pk, pv, mask)" if kind else "Attention<scale = 0.3>(q, pk, pv)"
    allowed = np.random.default_rng(1).random((batch, 1, new, past + new)) < 0.7
    allowed[:, :, 0] &= batch != 3  # rows that are masked wholly
    mask = {"float": np.where(allowed, 0, np.float32(-np.inf)), "bool": allowed}
    feed = feeds(*size, **({"mask": mask[kind]} if kind else {}))
    program = check_numerics("fuse-kv-cache", step(extra=extra, attention=attention, outputs=outputs), feed)
    assert [n.op_type for n in program.main.graph] == ["Attention"]


@pytest.mark.parametrize("size", SIZES)
def test_heads_that_were_split_stay_joined(size: tuple[int, int, int]) -> None:
    text = f"""
    {HEAD} decode (float[B, S, 32] x, float[B, S, 16] c, float[B, 2, P, 8] past_k, float[B, 2, P, 8] past_v,
                   float[B, S, 4] cos, float[B, S, 4] sin) => (float[B, S, 32] y, {CACHES})
    <int64[4] many = {{0, 0, 4, 8}}, int64[4] few = {{0, 0, 2, 8}}, int64[3] joined = {{0, 0, 32}}>
    {{
        qr = Reshape(x, many)
        qh = Transpose<perm = [0, 2, 1, 3]>(qr)
        q = RotaryEmbedding(qh, cos, sin)
        kr = Reshape(c, few)
        kh = Transpose<perm = [0, 2, 1, 3]>(kr)
        k = RotaryEmbedding(kh, cos, sin)
        vr = Reshape(c, few)
        v = Transpose<perm = [0, 2, 1, 3]>(vr)
        pk = Concat<axis = 2>(past_k, k)
        pv = Concat<axis = 2>(past_v, v)
        o = Attention(q, pk, pv)
        t = Transpose<perm = [0, 2, 1, 3]>(o)
        y = Reshape(t, joined)
    }}
    """
    batch, new, _ = size
    rng = np.random.default_rng(2)
    feed = {k: a for k, a in feeds(*size).items() if k.startswith("past")}
    feed |= {n: rng.standard_normal((batch, new, d), dtype=np.float32) for n, d in (("x", 32), ("c", 16))}
    angle = rng.random((batch, new, 4), dtype=np.float32)
    feed |= {"cos": np.cos(angle), "sin": np.sin(angle)}
    passes = "fuse-kv-cache,eliminate-dead-code,infer-shapes,compose-views,remove-no-ops,eliminate-dead-code"
    program = check_numerics(passes, text, feed)
    assert sorted(n.op_type for n in program.main.graph) == ["Attention", "RotaryEmbedding", "RotaryEmbedding"]


def test_a_second_reader_reads_what_is_cached() -> None:
    text = step(outputs="float[B, 4, S, 8] y, float[B, 2, T, 8] z", attention="Attention(q, pk, pv)\n z = Neg(pk)")
    program = check_numerics("fuse-kv-cache", text, feeds(2, 1, 4))
    assert [n.op_type for n in program.main.graph] == ["Attention", "Neg"]


DECLINES = {
    "causal": step(attention="Attention<is_causal = 1>(q, pk, pv)"),
    "along axis 3": step(axis="axis = 3").replace("T, 8]", "S, T]").replace("P, 8]", "S, P]"),
    "put together from 3 parts": step(keys="past_k, k, k"),
    "computed from its keys": step(
        more="length = Shape<start = 2, end = 3>(pk)\n one = Constant<value_ints = [1]>()\n"
        "to = Concat<axis = 0>(one, length)\n mask = Expand(row, to)",
        extra=", float[1, 1] row",
        attention="Attention(q, pk, pv, mask)",
    ),
}


@pytest.mark.parametrize("reason", [r for r in DECLINES if "parts" not in r])
def test_declines(reason: str) -> None:
    check_declines("fuse-kv-cache", DECLINES[reason], reason)


def test_three_parts_are_no_cache() -> None:
    check_untouched("fuse-kv-cache", DECLINES["put together from 3 parts"])


def test_a_cache_that_attention_has_is_left() -> None:
    text = f"""
    {HEAD} decode (float[B, 4, S, 8] q, float[B, 2, S, 8] k, float[B, 2, P, 8] past_k)
        => (float[B, 4, S, 8] y, {CACHES})
    {{ y, pk, pv = Attention(q, k, k, , past_k, past_k) }}
    """
    check_untouched("fuse-kv-cache", text)
