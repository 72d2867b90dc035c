"""What is read off graphs, and where nodes say they came from."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from planish.ir.graphs import constant_array, constant_tensor, dims_of, is_op, subgraphs_of
from planish.ir.printer import parse_model
from planish.ir.provenance import FROM_KEY, PASS_KEY, provenance

NESTED = """<ir_version: 10, opset_import: ["" : 23]>
g (float[n, 4] x, bool c) => (float[n, 4] y) <float[4] w = {1, 2, 3, 4}> {
  k = Constant <value_float = 2.0> ()
  y = If (c) <
    then_branch = t () => (float[n, 4] a) { a = Mul(x, w) },
    else_branch = e () => (float[n, 4] b) { b = Mul(x, k) }
  >
}"""


def test_dimensions_operators_and_subgraphs() -> None:
    graph = parse_model(NESTED).graph
    constant, branch = graph
    assert dims_of(graph.inputs[0]) == ("n", 4)
    assert dims_of(ir.Value(name="v")) is None and dims_of(None) is None
    assert is_op(branch, "Loop", "If") and not is_op(None, "If")
    assert [g.name for g in subgraphs_of(branch)] == ["t", "e"] and not list(subgraphs_of(constant))


def test_constants_are_what_no_caller_can_change() -> None:
    graph = parse_model(NESTED).graph
    assert constant_array(graph.initializers["w"]).tolist() == [1, 2, 3, 4]
    assert constant_array(graph.initializers["w"], limit=3) is None
    assert constant_array(graph[0].outputs[0]) == np.float32(2.0)
    assert constant_tensor(graph.inputs[0]) is None and constant_tensor(graph.outputs[0]) is None
    graph.inputs.append(graph.initializers["w"])  # now a caller may override it
    assert constant_tensor(graph.initializers["w"]) is None


@pytest.mark.parametrize("name", ["sparse_value", "value_of_another_version"])
def test_a_constant_of_an_unknown_form_is_unknown(name: str) -> None:
    node = ir.node("Constant", [], {name: 1})
    assert constant_tensor(node.outputs[0]) is None


def test_provenance_goes_back_to_the_nodes_of_the_users_model() -> None:
    first = ir.node("Mul", [], name="user_mul")
    made = ir.node("Mul", [], name="made", metadata_props={FROM_KEY: "user_div,user_erf"})
    assert provenance("fuse-x", [first, made, first]) == {PASS_KEY: "fuse-x", FROM_KEY: "user_mul,user_div,user_erf"}
    many = [ir.node("Mul", [], name=f"n{i}") for i in range(20)]
    assert len(provenance("fuse-x", many)[FROM_KEY].split(",")) == 8
