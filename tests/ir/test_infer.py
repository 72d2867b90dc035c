"""Inference: fills in what follows, keeps what is known, never trades a name or a number for less."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planish.ir.infer import infer_shapes, merge_shape
from planish.ir.printer import parse_model

DIM = st.one_of(st.none(), st.sampled_from(["B", "S", "unk__0"]), st.integers(1, 3))


def shapes(model: ir.Model) -> dict[str, str]:
    return {v.name or "": str(v.shape) for node in model.graph.all_nodes() for v in node.outputs}


def test_standard_and_dialect_operators() -> None:
    model = parse_model(
        """
        <ir_version: 10, opset_import: ["" : 23, "planish" : 1]>
        g (float[B, S, 8] x) => (float[B, S, 4] y) <float[8, 6] w1, float[6, 4] w2> {
          a = MatMul (x, w1)
          b = planish.SwiGLU (a, a)
          c = planish.SwiGLU (b, a)
          y = MatMul (c, w2)
        }
        """,
        infer=False,
    )
    for name, shape in (("w1", (8, 6)), ("w2", (6, 4))):
        value = next(v for n in model.graph for v in n.inputs if v is not None and v.name == name)
        value.const_value = ir.tensor(np.zeros(shape, np.float32), name=name)
        model.graph.register_initializer(value)
    infer_shapes(model)
    assert shapes(model) == {"a": "[B,S,6]", "b": "[B,S,6]", "c": "[B,S,6]", "y": "[B,S,4]"}
    assert {v.dtype for n in model.graph for v in n.outputs} == {ir.DataType.FLOAT}


def test_small_constants_carry_shapes_and_large_weights_do_not_travel() -> None:
    model = parse_model(
        """
        <ir_version: 10, opset_import: ["" : 23]>
        g (float[B, 12] x) => (float[a, b, c] y) <int64[3] target = {0, 3, 4}> { y = Reshape (x, target) }
        """
    )
    assert shapes(model) == {"y": "[a,3,4]"}


def test_contrib_operators_keep_what_their_values_have() -> None:
    model = parse_model(
        """
        <ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>
        g (float[B, 4] x) => (float[B, 4] y) <float[4] w = {1, 1, 1, 1}> {
          a = com.microsoft.BiasGelu (x, w)
          y = Relu (a)
        }
        """,
        infer=False,
    )
    a = model.graph[0].outputs[0]
    a.type, a.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["B", 4])
    infer_shapes(model)
    assert shapes(model) == {"a": "[B,4]", "y": "[B,4]"}


def test_known_names_win_over_made_up_ones_and_numbers_over_names() -> None:
    value = ir.Value(name="v", shape=ir.Shape(["batch", None, "k", 3]))
    assert merge_shape(value, ["unk__1", "unk__2", 5, "z"])
    assert str(value.shape) == "[batch,unk__2,5,3]"
    assert merge_shape(value, ["other", "seq", 5, 4])
    assert str(value.shape) == "[batch,seq,5,3]"
    assert not merge_shape(value, ["batch", "seq", 5])
    assert not merge_shape(value, [None, None, None, None])


@given(st.lists(st.tuples(DIM, DIM), max_size=4))
def test_merging_never_loses_information(pairs: list[tuple[int | str | None, int | str | None]]) -> None:
    value = ir.Value(name="v", shape=ir.Shape([a for a, _ in pairs]))
    merge_shape(value, [b for _, b in pairs])
    assert value.shape is not None
    for (old, new), dim in zip(pairs, value.shape, strict=True):
        now = dim if isinstance(dim, int) else dim.value
        if isinstance(old, int):
            assert now == old
        elif isinstance(old, str) and not old.startswith("unk__"):
            assert now == (new if isinstance(new, int) else old)
        elif old is not None:
            assert now is not None
        else:
            assert now == new


def test_a_model_that_contradicts_itself_keeps_what_it_has() -> None:
    model = parse_model(
        """
        <ir_version: 10, opset_import: ["" : 23]>
        g (float[2, 3] x, float[5, 7] z) => (float[2, 7] y) { y = MatMul (x, z) }
        """
    )
    assert shapes(model) == {"y": "[2,7]"}


def test_branches_are_inferred_inside() -> None:
    model = parse_model(
        """
        <ir_version: 10, opset_import: ["" : 23]>
        g (bool flag, float[N, 4] x) => (float[N, 4] y) {
          y = If (flag) <
            then_branch = yes () => (float[N, 4] p) { t = Neg (x)  p = Abs (t) },
            else_branch = no () => (float[N, 4] q) { q = Abs (x) }
          >
        }
        """
    )
    assert shapes(model)["t"] == "[N,4]"


def test_a_thousand_nodes_take_less_than_half_a_second() -> None:
    lines = ["v0 = MatMul (x, w)"]
    for i in range(1, 1000):
        lines.append(f"v{i} = Add (v{i - 1}, x)" if i % 2 else f"v{i} = Relu (v{i - 1})")
    body = "\n".join(lines)
    head = '<ir_version: 10, opset_import: ["" : 23]>\ng (float[B, 4] x, float[4, 4] w) => (float[B, 4] y)'
    model = parse_model(f"{head} {{ {body}\n y = Neg (v999) }}", infer=False)
    start = time.process_time()
    infer_shapes(model)
    assert time.process_time() - start < 0.5
    assert set(shapes(model).values()) == {"[B,4]"}


@pytest.mark.parametrize(("size", "propagates"), [(30_000, True), (10**9, False)])
def test_a_long_vector_is_no_shape(monkeypatch: pytest.MonkeyPatch, size: int, propagates: bool) -> None:
    # Propagation of data walks every element of a vector: with 1e9 of them it would not come back.
    vector = f"float[{size}]"
    text = f'<ir_version: 10, opset_import: ["" : 21]> g ({vector} x) => ({vector} y) {{ a = Add(x, x) y = Mul(a, x) }}'
    model, original, seen = ir.from_onnx_text(text), onnx.shape_inference.infer_shapes, []

    def watched(*args: Any, data_prop: bool, **more: Any) -> onnx.ModelProto:
        seen.append(data_prop)
        return original(*args, data_prop=data_prop, **more)

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", watched)
    infer_shapes(model)
    assert model.graph[0].outputs[0].shape == (size,)
    assert (True in seen) == propagates


def test_outputs_get_no_made_up_names() -> None:
    model = parse_model(
        """
        <ir_version: 10, opset_import: ["" : 23]>
        g (float[N, 4] x) => (int64[] y) { a = NonZero (x) b = Neg (a) y = Abs (b) }
        """
    )
    assert shapes(model)["a"].startswith("[2,unk__")
    assert shapes(model)["y"] == "[2,None]"
