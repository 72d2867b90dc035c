"""The pass around inference is honest about what it learned."""

from __future__ import annotations

from planish.passes.canonicalize.infer_shapes import InferShapes
from tests.passes.canonicalize.canonical_support import model_of, run_pass


def test_learns_once():
    model = model_of("agraph (float[B,4] x) => (float[B,4] y) { a = Neg(x)  y = Abs(a) }")
    value = model.graph[0].outputs[0]
    value.type = value.shape = None
    assert run_pass(InferShapes(), model).fired == 1
    assert str(value.shape) == "[B,4]"


def test_keeps_what_is_known():
    model = model_of("agraph (float[B,4] x) => (float[B,4] y) { a = Neg(x)  y = Abs(a) }")
    assert run_pass(InferShapes(), model).fired == 0
