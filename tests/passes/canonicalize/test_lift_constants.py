"""Constant nodes become initializers, all forms of them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from planish.ir.program import Program
from planish.passes.base import PassContext
from planish.passes.canonicalize.lift_constants import LiftConstants
from tests.passes.canonicalize.canonical_support import assert_same, interface, model_of, ops, reasons, run_pass


def test_every_form_of_constant():
    model = model_of("""agraph (float[2] x) => (float[2] y, int64[2] z)
    { a = Constant<value = float[2] {1, 2}>()  b = Constant<value_float = 2.0>()
      c = Constant<value_ints = [3, 4]>()  d = Constant<value_int = 5>()  e = Constant<value_floats = [1.0, 2.0]>()
      s = Add(x, a)  t = Mul(s, b)  y = Sub(t, e)  z = Add(c, d) }""")
    before = model.clone()
    assert run_pass(LiftConstants(), model).fired == 5
    assert ops(model) == ["Add", "Mul", "Sub", "Add"]
    assert {str(v.dtype) for v in model.graph.initializers.values()} == {"FLOAT", "INT64"}
    assert_same(before, model, {"x": np.array([1, 2], np.float32)})


def test_an_output_keeps_its_node():
    model = model_of("agraph () => (float y) { y = Constant<value_float = 2.0>() }")
    assert run_pass(LiftConstants(), model).fired == 0
    assert interface(model) == ([], ["y"])


@pytest.mark.no_verify
def test_declines_a_sparse_constant():
    model = model_of("agraph () => (float[3] z) { y = Constant<value_floats = [2.0, 1.0, 1.0]>() z = Neg(y) }")
    attributes = model.graph[0].attributes
    attributes.clear()
    attributes.add(ir.Attr("sparse_value", ir.AttributeType.SPARSE_TENSOR, None))
    result = LiftConstants().apply(Program.single(model), PassContext())
    assert result.fired == 0 and "sparse" in reasons(result)


def test_two_entries_get_names_of_their_own():
    text = "agraph (float x) => (float y) {{ c = Constant<value_float = {}>() y = Add(x, c) }}"
    program = Program({"a": model_of(text.format("1.0")), "b": model_of(text.format("2.0"))})
    assert run_pass(LiftConstants(), program).fired == 2
    assert sorted(float(t.numpy()) for t in program.weights.values()) == [1.0, 2.0]


def test_inside_a_branch():
    model = model_of("""agraph (bool c, float[1] x) => (float[1] y)
    { y = If(c) <then_branch = g1 () => (float[1] o) { k = Constant<value_floats=[2.0]>() o = Mul(x, k) },
                 else_branch = g2 () => (float[1] o) { k = Constant<value_floats=[3.0]>() o = Mul(x, k) }> }""")
    before = model.clone()
    assert run_pass(LiftConstants(), model).fired == 2
    x = np.ones(1, np.float32)
    assert_same(before, model, {"c": np.array(True), "x": x}, {"c": np.array(False), "x": x})
