"""Equal computations and equal weights are merged; random ones, and ones that only look equal, are not."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from planish.ir.program import Program
from planish.passes.canonicalize.eliminate_common_subexpressions import EliminateCommonSubexpressions
from tests.passes.canonicalize.canonical_support import assert_same, interface, model_of, ops, reasons, run_pass

CSE = EliminateCommonSubexpressions()
X = {"x": np.array([1, -2], np.float32)}


def test_equal_chains_merge():
    model = model_of("""agraph (float[2] x) => (float[2] y)
    { a = Relu(x)  b = Relu(x)  c = Neg(a)  d = Neg(b)  y = Add(c, d) }""")
    before = model.clone()
    assert run_pass(CSE, model).fired == 2
    assert ops(model) == ["Relu", "Neg", "Add"]
    assert_same(before, model, X)


def test_commuted_operands_and_missing_inputs():
    model = model_of("""agraph (float[2] x, float lo) => (float[2] y)
    { n = Neg(x)  a = Add(x, n)  b = Add(n, x)  c = Clip(a, lo)  d = Clip(b, lo, )  y = Sub(c, d) }""")
    before = model.clone()
    assert run_pass(CSE, model).fired == 2
    assert ops(model) == ["Neg", "Add", "Clip", "Sub"]
    assert_same(before, model, {**X, "lo": np.array(0, np.float32)})


@pytest.mark.parametrize(
    "body",
    [
        "a = Sub(x, n)  b = Sub(n, x)",
        "a = LeakyRelu<alpha=0.1>(x)  b = LeakyRelu<alpha=0.2>(x)",
        "a = RandomNormalLike(x)  b = RandomNormalLike(x)",
        "a = Bernoulli(x)  b = Bernoulli(x)",
        "a, = Dropout(x, r, t)  b = Dropout(x, r, t)".replace("a, =", "a ="),
        "a = Clip(x, zero, )  b = Clip(x, , zero)",
    ],
)
def test_what_is_not_equal(body):
    model = model_of(f"""agraph (float[2] x) => (float[2] y) <float zero = {{0}}, float r = {{0.5}}, bool t = {{1}}>
    {{ n = Neg(x)  {body}  y = Add(a, b) }}""")
    assert run_pass(CSE, model).fired == 0


def test_outputs_keep_their_names():
    model = model_of("agraph (float[2] x) => (float[2] y) { a = Relu(x)  b = Neg(a)  y = Relu(x) }")
    assert run_pass(CSE, model).fired == 1
    assert interface(model) == (["x"], ["y"]) and [v.name for v in model.graph[0].outputs] == ["y"]


def test_two_equal_outputs_decline():
    model = model_of("agraph (float[2] x) => (float[2] y, float[2] z) { y = Relu(x)  z = Relu(x) }")
    result = run_pass(CSE, model)
    assert result.fired == 0 and "'z' and 'y' are equal" in reasons(result)


def test_equal_weights_merge():
    model = model_of("""agraph (float[2] x) => (float[2] y)
    <float[2] a = {1, 2}, float[2] b = {1, 2}, float[2] c = {1, 3}, int32[2] d = {1, 2}>
    { s = Add(x, a)  t = Add(s, b)  u = Add(t, c)  k = Cast<to=1>(d)  y = Add(u, k) }""")
    before = model.clone()
    assert run_pass(CSE, model).fired == 1
    assert list(model.graph.initializers) == ["a", "c", "d"]
    assert_same(before, model, X)


def test_large_weights_only_within_the_bound():
    def build() -> ir.Model:
        model = model_of("agraph (float[9] x, float[9] a, float[9] b) => (float[9] y) { s = Add(x, a)  y = Sub(s, b) }")
        for value in list(model.graph.inputs)[1:]:
            model.graph.inputs.remove(value)
            value.const_value = ir.tensor(np.ones(9, np.float32))
            model.graph.register_initializer(value)
        return model

    assert run_pass(EliminateCommonSubexpressions(max_bytes=35), build()).fired == 0
    assert run_pass(CSE, build()).fired == 1


def test_entries_keep_the_same_weight():
    first = model_of(
        "agraph (float[1] x) => (float[1] y) <float[1] a = {1}, float[1] b = {1}> { s = Add(x, a) y = Sub(s, b) }"
    )
    second = first.clone()
    order = list(second.graph.initializers.items())
    for name, _ in order:
        del second.graph.initializers[name]
    for _, value in reversed(order):
        second.graph.register_initializer(value)
    program = Program({"prefill": first, "decode": second})
    assert run_pass(CSE, program).fired == 2
    assert list(program.weights) == ["a"]


def test_subgraphs_see_what_is_before_them_and_not_each_other():
    model = model_of("""agraph (bool c, float[2] x) => (float[2] y)
    { a = Relu(x)
      b = If(c) <then_branch = g1 () => (float[2] o) { i = Relu(x)  j = Abs(x)  k = Add(i, j)  o = Neg(k) },
                 else_branch = g2 () => (float[2] o) { j = Abs(x)  o = Exp(j) }>
      y = Add(a, b) }""")
    before = model.clone()
    assert run_pass(CSE, model).fired == 1
    assert_same(before, model, {"c": np.array(True), **X}, {"c": np.array(False), **X})


def test_equal_control_flow_merges_and_random_does_not():
    text = """agraph (bool c, float[2] x) => (float[2] y)
    { a = If(c) <then_branch = g1 () => (float[2] o) { o = OP(x) }, else_branch = g2 () => (float[2] p) { p = Neg(x) }>
      b = If(c) <then_branch = g3 () => (float[2] q) { q = OP(x) }, else_branch = g4 () => (float[2] r) { r = Neg(x) }>
      y = Add(a, b) }"""
    assert run_pass(CSE, model_of(text.replace("OP", "Abs"))).fired == 1
    assert run_pass(CSE, model_of(text.replace("OP", "RandomNormalLike"))).fired == 0


def test_calls_of_functions():
    text = """<ir_version: 10, opset_import: ["" : 23, "f" : 1]>
    agraph (float[2] x) => (float[2] y) { a = f.g(x)  b = f.g(x)  y = Add(a, b) }
    <domain: "f", opset_import: ["" : 23]> g (a) => (b) { b = OP(a) }"""
    assert run_pass(CSE, model_of(text.replace("OP", "Neg"), header="")).fired == 1
    assert run_pass(CSE, model_of(text.replace("OP", "RandomNormalLike"), header="")).fired == 0
