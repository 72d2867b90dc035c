"""Names that inference makes up: equal where sizes are proved equal, also over several runs."""

from __future__ import annotations

import onnx_ir as ir

from planish.ir.infer import infer_shapes
from planish.ir.printer import parse_model

HEAD = '<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>'


def dims(model: ir.Model, name: str) -> list[object]:
    value = next(v for n in model.graph.all_nodes() for v in n.outputs if v.name == name)
    assert value.shape is not None
    return [d if isinstance(d, int) else d.value for d in value.shape]


def test_what_a_later_run_proves_equal_gets_one_name() -> None:
    model = parse_model(
        f"""{HEAD} g (float[B, S, 4] x, float[B, S, 4] z, int64[3] t) => (float[P, Q, 4] y)
        <int64[3] same = {{0, 0, 4}}> {{ a = Add(x, x) b = Reshape(a, t) c = Relu(b) d = Neg(c) y = Abs(d) }}"""
    )
    infer_shapes(model)
    assert dims(model, "b") == dims(model, "d") and str(dims(model, "b")[0]).startswith("unk__")
    # Now the sizes of `b` are known: so are those of all that had its names.
    model.graph[1].replace_input_with(1, next(iter(model.graph.initializers.values())))
    infer_shapes(model)
    assert dims(model, "b") == dims(model, "d") == ["B", "S", 4]


def test_names_stay_where_nothing_is_learned() -> None:
    model = parse_model(
        f"""{HEAD} g (float[B, S, 4] x, int64[3] t) => (float[P, Q, R] y)
        {{ a = Reshape(x, t) b = com.microsoft.Gelu(a) c = Neg(b) y = Abs(c) }}""",
        infer=False,
    )
    infer_shapes(model)
    b = next(v for n in model.graph for v in n.outputs if v.name == "b")
    b.type, b.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["unk__0", "unk__1", "unk__2"])
    infer_shapes(model)
    before = {name: dims(model, name) for name in "abc"}
    assert before["a"] == before["b"] == before["c"]
    infer_shapes(model)
    assert {name: dims(model, name) for name in "abc"} == before


def test_numbers_replace_names_everywhere() -> None:
    model = parse_model(
        f"""{HEAD} g (float[B, 8] x, int64[2] t) => (float[P, Q] y)
        {{ a = Reshape(x, t) b = Neg(a) c = Relu(b) y = Abs(c) }}"""
    )
    infer_shapes(model)
    a, b = (next(v for n in model.graph for v in n.outputs if v.name == name) for name in "ab")
    assert dims(model, "a") == dims(model, "c")
    # A pass that knows more says so in one place.
    assert b.shape is not None and a.shape is not None
    a.shape = ir.Shape(["B", 8])
    infer_shapes(model)
    assert dims(model, "c") == ["B", 8]


def test_names_that_were_given_are_not_traded() -> None:
    model = parse_model(
        f"""{HEAD} g (float[B, S] x, float[M, N] z) => (float[B, S] y) {{ a = Add(x, z) b = Neg(a) y = Abs(b) }}"""
    )
    infer_shapes(model)
    a = model.graph[0].outputs[0]
    a.shape = ir.Shape(["B", "S"])
    infer_shapes(model)
    assert dims(model, "b") == ["B", "S"]
