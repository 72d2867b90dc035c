from __future__ import annotations

import numpy as np
import pytest

from planish.passes.testing import apply_pass, check_declines, check_numerics, check_rewrite, program_of

PASS = "lower-flash-attention{from_length=8}"


def model(
    call: str = "Attention<q_num_heads = 2, kv_num_heads = 2>(q, k, v)",
    *,
    keys: str = "9",
    widths: tuple[int, int, int] = (6, 6, 6),
    dtype: str = "float",
    extra: str = "",
    domains: str = "",
) -> str:
    q, k, v = widths
    heads = f"{dtype}[B, S, {q}] q, {dtype}[B, {keys}, {k}] k, {dtype}[B, {keys}, {v}] v"
    return f"""
    <ir_version: 10, opset_import: ["" : 23{domains}]>
    f ({heads}{extra}) => ({dtype}[B, S, {v * 2 if "q_num_heads = 4" in call else v}] y) {{ y = {call} }}
    """


def feed(batch: int, queries: int, keys: int = 9, widths: tuple[int, int, int] = (6, 6, 6)) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(batch + queries)
    lengths = (queries, keys, keys)
    return {
        name: rng.standard_normal((batch, n, width)).astype(np.float32)
        for name, n, width in zip("qkv", lengths, widths, strict=True)
    }


def test_long_attention_takes_the_flash_kernel() -> None:
    after = model("com.microsoft.MultiHeadAttention<num_heads = 2>(q, k, v)", domains=', "com.microsoft" : 1')
    check_rewrite(PASS, model(), after, edits=1)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (3, 9), (2, 40)])
def test_numerics(size: tuple[int, int]) -> None:
    check_numerics(PASS, model(), feed(*size))


def test_scale_and_values_of_another_depth() -> None:
    widths = (6, 6, 10)
    before = model("Attention<q_num_heads = 2, kv_num_heads = 2, scale = 0.3>(q, k, v)", widths=widths)
    program = check_numerics(PASS, before, feed(2, 5, widths=widths))
    (node,) = program.main.graph
    assert (node.op_type, node.attributes.get_float("scale")) == ("MultiHeadAttention", pytest.approx(0.3))


@pytest.mark.parametrize("length", [1024, 1111])
def test_numerics_where_the_default_length_is_reached(length: int) -> None:
    program = check_numerics("lower-flash-attention", model(keys=str(length)), feed(1, 33, length))
    assert [n.op_type for n in program.main.graph] == ["MultiHeadAttention"]


def test_a_second_run_finds_nothing() -> None:
    program = program_of(model())
    assert apply_pass(PASS, program).fired == 1
    assert not apply_pass(PASS, program).modified


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (model(keys="7"), "it has 7 keys, and the flash kernel pays from 8 on"),
        (model(keys="T"), "the number of keys is T, and short ones are faster as they are"),
        (model(dtype="float16"), "it is not float32"),
        (
            model("Attention<q_num_heads = 2, kv_num_heads = 2>(q, k, v, m)", extra=", bool[S, 9] m"),
            "it has a mask",
        ),
        (model("Attention<q_num_heads = 2, kv_num_heads = 2, is_causal = 1>(q, k, v)"), "it is causal"),
        (model("Attention<q_num_heads = 2, kv_num_heads = 2, softcap = 5.0>(q, k, v)"), "its scores are capped"),
        (
            model("Attention<q_num_heads = 4, kv_num_heads = 2>(q, k, v)", widths=(12, 6, 6)),
            "4 heads of queries share 2 of keys",
        ),
        (
            """<ir_version: 10, opset_import: ["" : 23]>
            f (float[B, 2, S, 3] q, float[B, 2, 9, 3] k, float[B, 2, 9, 3] v) => (float[B, 2, S, 3] y)
            { y = Attention(q, k, v) }""",
            "its heads are an axis of their own",
        ),
        (
            """<ir_version: 10, opset_import: ["" : 23]>
            f (float[B, S, 6] q, float[B, 9, 6] k, float[B, 9, 6] v) => (float[B, S, 6] y, float[B, 2, 9, 3] pk)
            { y, pk = Attention<q_num_heads = 2, kv_num_heads = 2>(q, k, v) }""",
            "inner value 'pk' is an output of the graph",
        ),
        (
            """<ir_version: 10, opset_import: ["" : 23]>
            f (float[B, S, 6] q, float[B, 9, 6] k, float[B, 9, 6] v, float[B, 2, 4, 3] pk, float[B, 2, 4, 3] pv)
              => (float[B, S, 6] y)
            { y = Attention<q_num_heads = 2, kv_num_heads = 2>(q, k, v, , pk, pv) }""",
            "it reads or writes a cache",
        ),
    ],
)
def test_declines(source: str, reason: str) -> None:
    check_declines(PASS, source, reason)


def test_other_targets_keep_theirs() -> None:
    check_declines(PASS, program_of(model(), "ort-cuda"), "target ort-cuda has its own attention kernels")
