"""Operators of other packages: found by entry point at the first unknown name, checked like our own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata

import onnx_ir as ir
import pytest

from planish.ir import ops
from planish.ir.errors import PlanishError, VerifyError
from planish.ir.infer import infer_shapes
from planish.ir.ops import DIALECT, Attribute, DialectOp, Operand, Schema, TensorInfo, import_functions, register_op
from planish.ir.printer import parse_model
from planish.ir.verify import verify_model

TEXT = """
<ir_version: 10, opset_import: ["" : 23, "planish" : 1]>
g (float[B, 4] x) => (float[B, 4] y) { [scaled] y = planish.Scaled <by = 2.0> (x) }
"""


def _body(opset: int) -> ir.Function:
    x = ir.Value(name="x")
    by = ir.node(
        "Constant",
        [],
        {"value_float": ir.RefAttr("value_float", "by", ir.AttributeType.FLOAT)},
        name="by",
        outputs=[ir.Value(name="c")],
    )
    cast = ir.node("CastLike", [by.outputs[0], x], name="cast", outputs=[ir.Value(name="d")])
    mul = ir.node("Mul", [x, cast.outputs[0]], name="mul", outputs=[ir.Value(name="y")])
    graph = ir.Graph([x], mul.outputs, nodes=[by, cast, mul], opset_imports={"": opset}, name="Scaled")
    return ir.Function("planish", "Scaled", graph=graph, attributes=[ir.Attr("by", ir.AttributeType.UNDEFINED, None)])


SCALED = DialectOp(
    Schema(
        "Scaled",
        (Operand("x"),),
        (Operand("y"),),
        (Attribute("by", ir.AttributeType.FLOAT, required=True),),
        "y = by * x",
    ),
    lambda inputs, attributes: [inputs[0] or TensorInfo()],
    _body,
    lambda x, by: (by * x,),
    lambda inputs, outputs, attributes: outputs[0].elements,
)


class Point:
    """What `importlib.metadata.entry_points` returns."""

    name = "scaled"

    def __init__(self, op: DialectOp) -> None:
        self.op = op

    def load(self) -> DialectOp:
        return self.op


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(metadata, "entry_points", lambda group: [Point(SCALED)] if group == "planish.ops" else [])
    monkeypatch.setattr(ops, "_plugins_read", False)
    yield
    DIALECT.pop("Scaled", None)


def test_plugin_operator_goes_all_the_way(plugin: None) -> None:
    assert "Scaled" not in DIALECT
    model = parse_model(TEXT)
    infer_shapes(model)
    verify_model(model, full=True)
    assert import_functions(model) == ["Scaled"]
    verify_model(model, full=True)
    assert str(model.graph.outputs[0].shape) == "[B,4]"


def test_plugin_schema_is_enforced(plugin: None) -> None:
    model = parse_model(TEXT.replace("<by = 2.0>", ""))
    with pytest.raises(
        VerifyError, match="node 'scaled' \\(planish::Scaled\\): attribute 'by' is required and missing"
    ):
        verify_model(model, full=False)
    model = parse_model(TEXT.replace("2.0", "2"))
    with pytest.raises(VerifyError, match="attribute 'by' is INT; it must be FLOAT"):
        verify_model(model, full=False)


def test_a_name_can_be_taken_once(plugin: None) -> None:
    register_op(SCALED)
    with pytest.raises(PlanishError, match="already has an operator planish::Scaled"):
        register_op(replace(SCALED, min_opset=21))


def test_a_body_under_another_name_is_refused() -> None:
    wrong = replace(SCALED, schema=replace(SCALED.schema, name="Other"))
    with pytest.raises(PlanishError, match="the body of planish::Other is named planish::Scaled"):
        wrong.function()
