"""Constant folding: what is folded, within which bounds, and what is left to the runtime."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from planish.ir.program import Program
from planish.passes.canonicalize.fold_constants import FoldConstants
from tests.passes.canonicalize.canonical_support import (
    assert_same,
    interface,
    model_of,
    ops,
    reasons,
    run_ort,
    run_pass,
)

FOLD = FoldConstants()


def test_a_chain_of_constants_becomes_one():
    model = model_of("""agraph (float[2] x) => (float[2] y) <float[2] a = {1, 2}, float[2] b = {3, 4}>
    { s = Add(a, b)  t = Mul(s, a)  y = Mul(x, t) }""")
    before = model.clone()
    result = run_pass(FOLD, model)
    assert (ops(model), result.fired) == (["Mul"], 2)
    (weight,) = model.graph.initializers.values()
    assert weight.const_value.numpy().tolist() == [4, 12]
    assert_same(before, model, {"x": np.array([1, -1], np.float32)})


def test_an_output_keeps_its_name_and_a_node():
    model = model_of("agraph () => (int64[2] y) <int64[2] a = {7, -7}, int64[2] b = {2, 2}> { y = Div(a, b) }")
    result = run_pass(FOLD, model)
    assert (ops(model), interface(model), result.fired) == (["Constant"], ([], ["y"]), 1)
    assert run_ort(model, {})[0].tolist() == [3, -3]  # towards zero


def test_the_node_knows_its_origin():
    model = model_of("agraph () => (int64[1] y) <int64[1] a = {7}> { [origin] y = Add(a, a) }")
    run_pass(FOLD, model)
    node = model.graph[0]
    assert node.metadata_props["planish.pass"] == "fold-constants"
    assert node.metadata_props["planish.from"] == "origin"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("c = Expand(one, huge)", "4000000000 bytes, over the limit"),
        ("c = ConstantOfShape(huge)", "4000000000 bytes, over the limit"),
        ("c = Tile(one, huge)", "4000000000 bytes, over the limit"),
        ("c = Exp(one)", "Exp has no kernel that is exact to the last bit"),
        ("c = MatMul(one, one)", "MatMul has no kernel"),
        ("c = Range(zero, ten, half)", "Range of floats"),
        ("q = Cast<to=6>(nan)  c = Cast<to=1>(q)", "outside of the range of INT32"),
        ("n = Cast<to=7>(zero)  q = Div(n, n)  c = Cast<to=1>(q)", "division by zero"),
        ("c = RandomUniformLike(one)", "RandomUniformLike has no kernel"),
        ("h = Cast<to=10>(one)  g = Add(h, h)  c = Cast<to=1>(g)", "half floats"),
    ],
)
def test_declines(body, reason):
    model = model_of(f"""agraph (float[1] x) => (float y)
    <float[1,1] one = {{1}}, int64[2] huge = {{40000, 25000}}, float[1] nan = {{nan}}, float zero = {{0}},
     float ten = {{10}}, float half = {{0.5}}>
    {{ {body}  d = Add(x, c)  y = ReduceMax<keepdims=0>(d) }}""")
    assert reason in reasons(run_pass(FOLD, model))


def test_quantized_weights_stay_quantized():
    model = model_of("""agraph (float[2] x) => (float[2] y) <int8[2] w = {1, 2}, float s = {0.5}>
    { d = DequantizeLinear(w, s)  y = Add(x, d) }""")
    result = run_pass(FOLD, model)
    assert result.fired == 0 and "quantized" in reasons(result)


def test_a_result_no_larger_than_what_it_frees_is_not_bounded():
    weight = np.arange(500 * 700, dtype=np.float32).reshape(500, 700)
    model = _transposed(weight)
    assert run_pass(FoldConstants(max_bytes=0), model).fired == 1
    assert ops(model) == ["MatMul", "Identity"]


def test_the_bound_counts_what_stays():
    weight = np.arange(500 * 700, dtype=np.float32).reshape(500, 700)
    model = _transposed(weight, also_used=True)
    result = run_pass(FoldConstants(max_bytes=1000), model)
    assert result.fired == 0 and "over the limit of 1000" in reasons(result)
    result = run_pass(FoldConstants(max_growth=1000), model)
    assert result.fired == 0 and "over the limit of 1000" in reasons(result)


def _transposed(weight: np.ndarray, also_used: bool = False) -> ir.Model:
    more = "z = MatMul(y, w)" if also_used else "z = Identity(y)"
    width = weight.shape[1] if also_used else weight.shape[0]
    model = model_of(f"""agraph (float[3,{weight.shape[1]}] x, float{list(weight.shape)} w) => (float[3,{width}] z)
    {{ t = Transpose(w)  y = MatMul(x, t)  {more} }}""")
    value = model.graph.inputs.pop(1)
    value.const_value = ir.tensor(weight)
    model.graph.register_initializer(value)
    return model


def test_an_input_with_a_default_is_not_constant():
    model = model_of("agraph (int64[1] y) => (int64[1] z) { z = Add(y, y) }")
    value = model.graph.inputs[0]
    value.const_value = ir.tensor(np.array([1]), name="y")
    model.graph.register_initializer(value)
    assert run_pass(FOLD, model).fired == 0


IF = """agraph (float[2] x) => (float[2] y) <bool c = {COND}>
{ one = Constant<value_float=1.0>()
  y = If(c) <then_branch = g1 () => (float[2] o) { t = Neg(x)  o = Add(t, one) },
             else_branch = g2 () => (float[2] o) { t = Abs(x)  o = Sub(t, one) }> }"""


@pytest.mark.parametrize(("condition", "expected"), [("1", "Neg Add"), ("0", "Abs Sub")])
def test_a_constant_condition_leaves_its_branch(condition, expected):
    model = model_of(IF.replace("COND", condition))
    before = model.clone()
    assert run_pass(FOLD, model).fired == 1
    assert ops(model)[1:] == expected.split() and interface(model) == (["x"], ["y"])
    assert_same(before, model, {"x": np.array([1, -2], np.float32)})


def test_nested_conditions_and_branch_constants():
    model = model_of("""agraph (float[1] x) => (float[1] y) <bool c = {1}>
    { u = If(c) <then_branch = g1 () => (float[1] o)
                 { k = Constant<value_floats=[2.0]>()
                   m = Mul(x, k)
                   o = If(c) <then_branch = g3 () => (float[1] p) { k2 = Add(k, k) p = Mul(m, k2) },
                              else_branch = g4 () => (float[1] p) { p = Identity(m) }> },
                 else_branch = g2 () => (float[1] o) { o = Identity(x) }>
      y = Add(u, x) }""")
    before = model.clone()
    run_pass(FOLD, model)
    assert "If" not in ops(model)
    assert_same(before, model, {"x": np.array([3], np.float32)})


def test_entries_share_what_they_fold():
    weight = np.arange(12, dtype=np.float32).reshape(3, 4)
    first = _transposed(weight)
    second = first.clone()
    program = Program({"prefill": first, "decode": second})
    assert run_pass(FOLD, program).fired == 2
    assert len(program.weights) == 1  # raises where they disagree


def test_inside_a_loop_and_not_inside_functions():
    model = model_of("""agraph (int64 n, float[1] x) => (float[1] y) <bool go = {1}>
    { y = Loop(n, go, x) <body = b (int64 i, bool c, float[1] s) => (bool co, float[1] so)
        { a = Constant<value_floats=[1.0]>()  d = Add(a, a)  so = Add(s, d)  co = Identity(c) }> }""")
    before = model.clone()
    result = run_pass(FOLD, model)
    assert result.fired == 1
    assert_same(before, model, *({"n": np.array(n), "x": np.ones(1, np.float32)} for n in (0, 1, 3)))
