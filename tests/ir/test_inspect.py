"""What inspection finds in a program."""

from __future__ import annotations

import json

import onnx_ir as ir
import pytest

from planish.ir.errors import InputError
from planish.ir.inspect import inspect_program
from planish.ir.program import Program

TEXT = """<ir_version: 10, opset_import: ["" : 23]>
g (float[batch, 4] x) => (float[batch, 4] y) <float[4, 4] w = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1}>
{
  a = MatMul(x, w)
  y = Relu(a)
}"""


def program(text: str = TEXT) -> Program:
    return Program.single(ir.from_onnx_text(text))


def test_interface_operators_and_weights() -> None:
    found = inspect_program(program())
    assert found.inputs == {"main": ["x: float[batch, 4]"]} and found.outputs == {"main": ["y: float[batch, 4]"]}
    assert found.ops == {"MatMul": 1, "Relu": 1} and found.nodes == 2
    assert (found.weights, found.weight_bytes, found.dtypes) == (1, 64, {"float": 64})
    assert found.opsets == {"ai.onnx": 23}
    assert [(b.name, b.nodes) for b in found.blocks] == [("nodes 1 to 2", 2)]
    assert json.loads(json.dumps(found.to_dict()))["nodes"] == 2


def test_costs_grow_with_the_sizes_that_are_given() -> None:
    small, large = (inspect_program(program(), {"batch": n}) for n in (1, 10))
    assert small.dims == {"batch": 1} and small.flops_by_op["MatMul"] == 2 * 4 * 4
    assert large.flops == 10 * (small.flops or 0)


def test_a_dimension_that_is_none_gets_a_suggestion() -> None:
    with pytest.raises(InputError, match="Did you mean 'batch'"):
        inspect_program(program(), {"bach": 2})


def test_inputs_that_can_not_be_made_up_leave_costs_unknown() -> None:
    text = """<ir_version: 10, opset_import: ["" : 23]>
g (seq(float[2]) x) => (int64 y) { y = SequenceLength(x) }"""
    found = inspect_program(program(text))
    assert found.nodes == 1
    assert found.inputs["main"][0].startswith("x: non-tensor")


def test_nodes_are_counted_by_the_pass_that_made_them() -> None:
    built = program()
    built.main.graph[0].metadata_props["planish.pass"] = "fuse-x"
    assert inspect_program(built).made_by == {"fuse-x": 1}
