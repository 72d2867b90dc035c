"""Weights that ONNX Runtime drops or moves on its own are no reason to refuse the session that they are handed to."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from planish.ir.printer import parse_model
from planish.ir.target import Target
from planish.runtime.ort import compile_ort

SIGNATURE = "g (float[n, 300] x, float[300, 300] w) => (float[n, 300] y)"
BRANCHES = """then_branch = t () => (float[n, 300] a) { a = MatMul (x, w) },
    else_branch = e () => (float[n, 300] b) { b = Relu (x) }"""
CASES = {
    "unused": "{ y = Relu (x) }",
    "used by dead code": "{ z = MatMul (x, w) y = Relu (x) }",
    "only its shape": "{ s = Shape (w) c = ConstantOfShape (s) y = MatMul (x, c) }",
    "behind Identity": "{ z = Identity (w) y = MatMul (x, z) }",
    "folded": "<int64[2] s = {300, 300}> { z = Reshape (w, s) y = MatMul (x, z) }",
    "in a branch": f"<bool c = {{1}}> {{ y = If (c) < {BRANCHES} > }}",
    "in a branch not taken": f"<bool c = {{0}}> {{ y = If (c) < {BRANCHES} > }}",
    "dropped by a function": '{ y = l.f (x, w) }\n<domain: "l", opset_import: ["" : 20]> '
    "f (a, b) => (r) { r = Relu (a) }",
}


@pytest.mark.parametrize("optimize", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_weights_that_the_runtime_does_not_need(name: str, optimize: bool) -> None:
    text = f'<ir_version: 10, opset_import: ["" : 20, "l" : 1]> {SIGNATURE} {CASES[name]}'
    model = parse_model(text, infer=False)
    weight = model.graph.inputs.pop()
    weight.const_value = ir.tensor(np.ones((300, 300), np.float32), name="w")
    model.graph.register_initializer(weight)
    runner = compile_ort(model, Target.parse("ort-cpu"), optimize=optimize)
    assert runner.run({"x": np.ones((2, 300), np.float32)})["y"].shape == (2, 300)


@pytest.mark.parametrize("optimize", [True, False])
@pytest.mark.parametrize("role", ["inputs", "outputs"])
def test_a_weight_that_is_an_input_or_an_output_too(role: str, optimize: bool) -> None:
    model = parse_model(f'<ir_version: 10, opset_import: ["" : 20]> {SIGNATURE} {{ y = MatMul (x, w) }}', infer=False)
    weight = model.graph.inputs.pop()
    weight.const_value = ir.tensor(np.ones((300, 300), np.float32), name="w")
    model.graph.register_initializer(weight)
    getattr(model.graph, role).append(weight)
    outputs = compile_ort(model, Target.parse("ort-cpu"), optimize=optimize).run({"x": np.ones((2, 300), np.float32)})
    np.testing.assert_array_equal(outputs["y"], np.full((2, 300), 300, np.float32))
    assert set(outputs) == ({"y", "w"} if role == "outputs" else {"y"})
