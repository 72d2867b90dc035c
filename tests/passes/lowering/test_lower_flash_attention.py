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
    constants: str = "",
    setup: str = "",
    domains: str = "",
) -> str:
    q, k, v = widths
    heads = f"{dtype}[B, S, {q}] q, {dtype}[B, {keys}, {k}] k, {dtype}[B, {keys}, {v}] v"
    return f"""
    <ir_version: 10, opset_import: ["" : 23{domains}]>
    f ({heads}{extra}) => ({dtype}[B, S, {v * 2 if "q_num_heads = 4" in call else v}] y)
    {constants} {{ {setup} y = {call} }}
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


MASKED = "Attention<q_num_heads = 2, kv_num_heads = 2>(q, k, v, m)"
MASKS = {
    "bool[S, 9] m": lambda b, s: np.ones((s, 9), bool),
    "bool[B, 1, S, 9] m": lambda b, s: np.ones((b, 1, s, 9), bool),
    "float[B, 1, S, 9] m": lambda b, s: np.zeros((b, 1, s, 9), np.float32),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("size", [(1, 1), (2, 7)])
@pytest.mark.parametrize("hidden", ["nothing", "a key", "a row"])
def test_a_mask_is_looked_at_when_the_model_runs(mask: str, size: tuple[int, int], hidden: str) -> None:
    inputs = feed(*size)
    inputs["m"] = MASKS[mask](*size)
    low = False if inputs["m"].dtype == bool else -np.inf
    if hidden == "a key":
        inputs["m"][..., 0, 3] = low
    elif hidden == "a row":
        inputs["m"][..., 0, :] = low
    program = check_numerics(PASS, model(MASKED, extra=f", {mask}"), inputs)
    (chosen,) = [n for n in program.main.graph if n.op_type == "If"]
    assert [n.op_type for n in chosen.attributes.get_graph("then_branch")] == ["MultiHeadAttention"]
    assert [n.op_type for n in chosen.attributes.get_graph("else_branch")] == ["Attention"]


def test_the_condition_reads_the_mask_before_it_is_expanded() -> None:
    source = model(
        MASKED,
        setup="t = Constant<value_ints = [1, 1, 5, 9]>()  e = Unsqueeze(p, a)  m = Expand(e, t)",
        constants="<int64[2] a = {1, 2}>",
        extra=", bool[B, 9] p",
    )
    inputs = feed(2, 5) | {"p": np.ones((2, 9), bool)}
    program = check_numerics(PASS, source, inputs)
    (reshape,) = [n for n in program.main.graph if n.op_type == "Reshape"]
    assert reshape.inputs[0] is program.main.graph.inputs[3]
    inputs["p"][1, 4:] = False
    check_numerics(PASS, source, inputs)


def test_layers_share_the_condition() -> None:
    source = """<ir_version: 10, opset_import: ["" : 23]>
    f (float[B, 9, 6] q, bool[B, 1, 9, 9] m) => (float[B, 9, 6] y)
    {
      h = Attention<q_num_heads = 2, kv_num_heads = 2>(q, q, q, m)
      y = Attention<q_num_heads = 2, kv_num_heads = 2>(h, h, h, m)
    }"""
    program = program_of(source)
    assert apply_pass(f"{PASS},eliminate-common-subexpressions,eliminate-dead-code", program).modified
    ops = [n.op_type for n in program.main.graph]
    assert (ops.count("If"), ops.count("ReduceMin")) == (2, 1)


@pytest.mark.parametrize("keys", [1, 7, 8, 9, 30])
def test_symbolic_lengths_are_compared_when_the_model_runs(keys: int) -> None:
    symbolic = "lower-flash-attention{from_length=8, symbolic=True}"
    program = check_numerics(symbolic, model(keys="T"), feed(2, 5, keys))
    assert "If" in [n.op_type for n in program.main.graph]


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
        (
            model(keys="T"),
            "the number of keys is T, and short ones are faster as they are (if they are long, say symbolic",
        ),
        (model(dtype="float16"), "it is not float32"),
        (
            model(
                "Attention<q_num_heads = 2, kv_num_heads = 2>(q, k, v, m)",
                constants="<bool[1, 9] m = {1,1,1,1,1,1,1,1,0}>",
            ),
            "its mask 'm' is a constant",
        ),
        (
            model(
                "Attention<q_num_heads = 2, kv_num_heads = 2>(q, k, v, m)",
                setup="""i = Constant<value = int64[9, 1] {0,1,2,3,4,5,6,7,8}>()
                j = Constant<value = int64[1, 9] {0,1,2,3,4,5,6,7,8}>()
                c = GreaterOrEqual(i, j)
                m = And(c, p)""",
                extra=", bool[1, 9] p",
            ),
            "its mask 'm' is causal",
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
