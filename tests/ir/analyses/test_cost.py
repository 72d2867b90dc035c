"""Cost: operations by operator against counts by hand, bytes moved, symbols, and what is not known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planish.ir.analyses.cost import cost
from planish.ir.printer import parse_model
from planish.ir.program import Program

IMPORTS = '"" : 23, "com.microsoft" : 1, "planish" : 1, "my" : 1'


def model(signature: str, body: str) -> ir.Model:
    return parse_model(f"<ir_version: 10, opset_import: [{IMPORTS}]>\ng ({signature}) {{ {body} }}")


@pytest.mark.parametrize(
    ("signature", "body", "flops", "moved"),
    [
        ("float[2, 3, 4] x, float[4, 5] w) => (float[2, 3, 5] y", "y = MatMul (x, w)", 2 * 4 * 30, 4 * (24 + 20 + 30)),
        (
            "float[4, 3] x, float[5, 4] w, float[5] b) => (float[3, 5] y",
            "y = Gemm <transA = 1, transB = 1> (x, w, b)",
            2 * 4 * 15 + 15,
            4 * (12 + 20 + 5 + 15),
        ),
        (
            "float[2, 4, 9, 9] x, float[6, 2, 3, 3] w, float[6] b) => (float[2, 6, 7, 7] y",
            "y = Conv <group = 2> (x, w, b)",
            2 * (2 * 6 * 49) * (2 * 9) + 2 * 6 * 49,
            4 * (648 + 108 + 6 + 588),
        ),
        (
            "float[1, 4, 5, 5] x, float[4, 3, 2, 2] w) => (float[1, 3, 6, 6] y",
            "y = ConvTranspose (x, w)",
            2 * 100 * 12,
            4 * (100 + 48 + 108),
        ),
        (
            "float[1, 2, 8, 8] x) => (float[1, 2, 4, 4] y",
            "y = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (x)",
            4 * 32,
            4 * 160,
        ),
        ("float[2, 3] x, float[3] b) => (float[2, 3] y", "y = Add (x, b)", 6, 4 * 15),
        ("float[2, 3] x) => (float[2, 3] y", "y = Mul (x, x)", 6, 4 * 12),
        ("float[2, 3] x) => (float[6] y", "s = Constant <value_ints = [6]> () y = Reshape (x, s)", 0, 0),
        ("float[2, 3] x) => (float[3, 2] y", "y = Transpose <perm = [1, 0]> (x)", 0, 48),
        ("float[1000, 8] t, int64[2] i) => (float[2, 8] y", "y = Gather (t, i)", 0, 2 * 64 + 16),
        (
            "float[2, 8] x, float[8] s) => (float[2, 8] y",
            "y = RMSNormalization (x, s)",
            8 * 16,
            4 * (16 + 8 + 16),
        ),
        (
            "float[2, 3, 4, 8] q, float[2, 3, 6, 8] k, float[2, 3, 6, 10] v) => (float[2, 3, 4, 10] y",
            "y = Attention (q, k, v)",
            2 * 3 * 4 * 6 * (2 * 8 + 8 + 2 * 10),
            4 * (192 + 288 + 360 + 240),
        ),
        (
            "float[2, 4, 24] q, float[2, 6, 8] k, float[2, 6, 8] v) => (float[2, 4, 24] y",
            "y = Attention <q_num_heads = 3, kv_num_heads = 1> (q, k, v)",
            2 * 3 * 4 * 6 * (2 * 8 + 8 + 2 * 8),
            4 * (192 + 96 + 96 + 192),
        ),
        (
            "float[2, 3, 4] a, float[2, 4, 5] b) => (float[2, 3, 5] y",
            'y = Einsum <equation = "bij,bjk->bik"> (a, b)',
            2 * 2 * 3 * 4 * 5,
            4 * (24 + 40 + 30),
        ),
        ("float16[2, 3] g, float16[2, 3] u) => (float16[2, 3] y", "y = planish.SwiGLU (g, u)", 30, 36),
        (
            "float[7, 2, 3] x, float[1, 16, 3] w, float[1, 16, 4] r) => (float[7, 1, 2, 4] y",
            "y = LSTM <hidden_size = 4> (x, w, r)",
            2 * 7 * 2 * 4 * 4 * (3 + 4),
            4 * (42 + 48 + 64 + 56),
        ),
    ],
)
def test_operators(signature: str, body: str, flops: int, moved: int) -> None:
    result = cost(model(signature, body))
    assert (result.flops, result.bytes, result.unknown, result.unresolved) == (flops, moved, {}, [])


def test_symbols_take_the_sizes_that_are_given() -> None:
    m = model(
        "float[batch, seq, 4] x, float[4, 4] w) => (float[batch, seq, 4] y",
        "a = MatMul (x, w) s = Constant <value_ints = [0, -1, 2, 2]> () h = Reshape (a, s) "
        "t = Transpose <perm = [0, 2, 1, 3]> (h) u = Relu (t) f = Constant <value_ints = [0, -1, 4]> () "
        "y = Reshape (u, f)",
    )
    result = cost(m, dims={"batch": 3, "seq": 5})
    assert result.by_op["MatMul"].flops == 2 * 4 * 60 and result.by_op["Relu"].flops == 60
    assert result.dims == {"batch": 3, "seq": 5}
    assert not result.unresolved
    assert cost(m).dims == {"batch": 2, "seq": 16}
    assert cost(Program.single(m)).flops == cost(m).flops
    assert result.intensity == result.flops / result.bytes
    assert next(iter(result.by_op)) == "MatMul"


def test_what_is_not_known_is_listed() -> None:
    m = model(
        "float[2, 3] x) => (float[2, 3] y, float[n, m] z",
        "a = com.microsoft.SomethingNew (x) y = Relu (x) b = NonZero (x) c = Cast <to = 1> (b) z = Relu (c)",
    )
    result = cost(m)
    assert result.unknown == {"com.microsoft::SomethingNew": 1, "Relu": 1}
    assert set(result.unresolved) == {"b", "c"}
    assert result.by_op["Relu"].flops == 6


def test_contrib_attention() -> None:
    m = model("float[2, 4, 24] q, float[2, 6, 24] k, float[2, 6, 24] v) => (float[2, 4, 24] y", "y = Identity (q)")
    node = ir.node("MultiHeadAttention", m.graph.inputs, {"num_heads": 3}, domain="com.microsoft", name="mha")
    node.outputs[0].name = "z"
    node.outputs[0].type, node.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([2, 4, 24])
    m.graph.append(node)
    assert cost(m).nodes["mha"].flops == 2 * 3 * 4 * 6 * (2 * 8 + 8 + 2 * 8)


def test_functions_count_by_their_bodies_and_branches_once() -> None:
    m = parse_model(
        f"""
        <ir_version: 10, opset_import: [{IMPORTS}]>
        g (bool flag, float[N, 4] x) => (float[N, 4] y) {{
          a = my.Twice (x)
          y = If (flag) <
            then_branch = yes () => (float[N, 4] p) {{ p = Neg (a) }},
            else_branch = no () => (float[N, 4] q) {{ q = Identity (a) }}
          >
        }}
        <domain: "my", opset_import: ["" : 23]>
        Twice (v) => (r) {{ r = Add (v, v) }}
        """
    )
    result = cost(m, dims={"N": 3})
    assert result.by_op["Add"].flops == 12 and result.by_op["Neg"].flops == 12
    assert result.flops == 24 and not result.unknown
    assert ("my", "Twice", "") in m.functions  # the model itself is as it was


@settings(max_examples=30, deadline=None)
@given(widths=st.lists(st.integers(1, 9), min_size=2, max_size=6), batch=st.integers(1, 5))
def test_chains_of_products(widths: list[int], batch: int) -> None:
    m = model(f"float[N, {widths[0]}] v0) => (float[N, {widths[-1]}] y", f"y = Identity (v{len(widths) - 1})")
    identity = m.graph[0]
    m.graph.remove(identity)
    value, nodes = m.graph.inputs[0], []
    for index, (a, b) in enumerate(itertools.pairwise(widths)):
        weight = ir.Value(name=f"w{index}", const_value=ir.tensor(np.zeros((a, b), np.float32), name=f"w{index}"))
        m.graph.register_initializer(weight)
        nodes.append(ir.node("MatMul", [value, weight], name=f"n{index}", outputs=[ir.Value(name=f"v{index + 1}")]))
        value = nodes[-1].outputs[0]
    m.graph.extend(nodes)
    m.graph.outputs[0] = value
    value.type = ir.TensorType(ir.DataType.FLOAT)
    result = cost(m, dims={"N": batch})
    pairs = list(itertools.pairwise(widths))
    assert result.flops == sum(2 * batch * a * b for a, b in pairs)
    assert result.bytes == 4 * sum(batch * a + a * b + batch * b for a, b in pairs)
    assert math.isclose(sum(c.flops for c in result.nodes.values()), result.flops)


def test_of_a_condition_the_dearer_branch_counts() -> None:
    m = model(
        "bool flag, float[8, 8] x) => (float[8, 8] y",
        """
        y = If (flag) <
          then_branch = yes () => (float[8, 8] p) { [small] p = Neg (x) },
          else_branch = no () => (float[8, 8] q) { [large] q = MatMul (x, x) }
        >""",
    )
    found = cost(m)
    assert found.flops == 2 * 8 * 64 and set(found.by_op) >= {"MatMul", "If"} and "Neg" not in found.by_op
    assert {"small", "large"} <= set(found.nodes)
