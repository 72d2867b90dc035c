"""Differences of two programs."""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir

from planish.ir.diff import diff_programs
from planish.ir.program import Program

TEXT = """<ir_version: 10, opset_import: ["" : 23]>
g (float[batch, 4] x) => (float[batch, 4] y) <float[4] scale = {1, 2, 3, 4}, float[4] shift = {0, 0, 0, 1}>
{
  a = Mul(x, scale)
  b = Identity(a)
  y = Add(b, shift)
}"""


def program(text: str = TEXT) -> Program:
    model = ir.from_onnx_text(text)
    for index, node in enumerate(model.graph):
        node.name = f"{node.op_type}_{index}"
    return Program.single(model)


def test_equal_programs_have_no_difference() -> None:
    found = diff_programs(program(), program())
    assert found.same
    assert not any((found.ops, found.blocks, found.added, found.removed, found.weights, found.interface))


def test_renamed_nodes_leave_the_models_equal() -> None:
    other = program()
    other.main.graph[0].name = "another"
    found = diff_programs(program(), other)
    assert found.same and found.added == ["another (Mul)"] and found.removed == ["Mul_0 (Mul)"]


def test_operators_and_nodes() -> None:
    other = program(TEXT.replace("b = Identity(a)", "b = Relu(a)"))
    found = diff_programs(program(), other)
    assert not found.same
    assert found.ops == {"Identity": (1, 0), "Relu": (0, 1)}
    assert found.removed == ["Identity_1 (Identity)"] and found.added == ["Relu_1 (Relu)"]
    assert found.blocks[0].ops == {"Identity": (1, 0), "Relu": (0, 1)}


def test_weights_added_removed_changed_and_renamed() -> None:
    other = program(TEXT.replace("{0, 0, 0, 1}", "{0, 0, 0, 2}").replace("scale", "gain"))
    changes = {(w.change, w.name): w.detail for w in diff_programs(program(), other).weights}
    assert changes == {("renamed", "gain"): "was scale", ("changed", "shift"): "float[4] → float[4]"}
    other = program(TEXT.replace("scale = {1, 2, 3, 4}", "gain = {5, 6, 7, 8}").replace("scale", "gain"))
    assert {(w.change, w.name) for w in diff_programs(program(), other).weights} == {
        ("added", "gain"),
        ("removed", "scale"),
    }


def test_the_same_bytes_in_another_object_are_no_change() -> None:
    other = program()
    value = other.main.graph.initializers["scale"]
    value.const_value = ir.tensor(np.array([1, 2, 3, 4], np.float32), name="scale")
    assert diff_programs(program(), other).same


def test_interface_and_opsets() -> None:
    other = program(TEXT.replace('"" : 23', '"" : 22').replace("batch, 4] x", "n, 4] x").replace(" y", " z"))
    lines = diff_programs(program(), other).interface
    assert lines == [
        "input x: float[batch, 4] → x: float[n, 4]",
        "output y: float[batch, 4] removed",
        "output z: float[batch, 4] added",
        "opset of ai.onnx: 23 → 22",
    ]


def test_entries_come_and_go() -> None:
    one = program()
    two = Program({"main": one.main, "decode": one.clone().main})
    assert diff_programs(one, two).interface == ["entry 'decode' added"]


def test_the_difference_is_plain_data() -> None:
    found = diff_programs(program(), program(TEXT.replace("Identity", "Relu")))
    assert json.loads(json.dumps(found.to_dict()))["ops"]["Relu"] == [0, 1]
