"""Masks of attention without the axis of queries; numbers by ONNX's reference, as ONNX Runtime refuses such masks."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from planish.ir.infer import infer_shapes
from planish.ir.printer import parse_model
from planish.ir.program import Program
from planish.passes.testing import apply_pass, check_declines, program_of

PASS = "narrow-attention-mask"
TARGET = "tvm-cuda"
HEADS = "q_num_heads = 4, kv_num_heads = 2, scale = 0.4"
RANDOM = np.random.default_rng(0)


def source(inputs: str, body: str, heads: str = HEADS, weights: dict[str, Any] | None = None) -> ir.Model:
    text = f"""<ir_version: 11, opset_import: ["" : 23]>
      g (float[n, s, 16] q, float[n, s, 8] k, float[n, s, 8] v{inputs}) => (float[n, s, 16] y)
      {"<int64[s] count>" if "count" in body else ""} {{ {body} y = Attention<{heads}>(q, k, v, m) }}"""
    model = parse_model(text)
    for name, array in (weights or {}).items():
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        value.type, value.shape = ir.TensorType(value.const_value.dtype), ir.Shape(array.shape)
        for node in model.graph:
            for index, old in enumerate(node.inputs):
                if old is not None and old.name == name and old is not value:
                    node.replace_input_with(index, value)
        model.graph.register_initializer(value)
    infer_shapes(model)
    return model


def numerics(model: ir.Model, more: dict[str, np.ndarray], length: int = 6) -> Program:
    """The program after the pass; its numbers are those before."""
    program = program_of(model, TARGET)
    result = apply_pass(["infer-shapes", PASS, "eliminate-dead-code"], program)
    assert result.fired
    feeds = {
        name: RANDOM.standard_normal((2, length, width)).astype(np.float32)
        for name, width in (("q", 16), ("k", 8), ("v", 8))
    }
    want, got = (ReferenceEvaluator(ir.to_proto(item)).run(None, feeds | more)[0] for item in (model, program.main))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    return program


def padding(length: int = 6) -> np.ndarray:
    kept = np.ones((2, 1, 1, length), bool)
    kept[1, ..., 4:] = False
    return kept


def test_padding_loses_its_queries() -> None:
    model = source(
        ", bool[n, 1, 1, s] p",
        "d = Shape<start = 0, end = 2>(q) s = Shape<start = 1, end = 2>(q) b = Shape<start = 0, end = 1>(q)"
        " sizes = Concat<axis = 0>(b, one, s, s) m = Expand(p, sizes)",
        weights={"one": np.ones(1, np.int64)},
    )
    program = numerics(model, {"p": padding()})
    (node,) = (node for node in program.main.graph if node.op_type == "Attention")
    assert node.inputs[3] is program.main.graph.inputs[3]
    assert node.attributes.get_float("scale") == pytest.approx(0.4) and not node.attributes.get_int("is_causal")


def test_a_float_mask_stays_one() -> None:
    model = source(
        ", bool[n, 1, 1, s] p",
        "b = Shape<start = 0, end = 1>(q) s = Shape<start = 1, end = 2>(q) sizes = Concat<axis = 0>(b, one, s, s)"
        " e = Expand(p, sizes) m = Where(e, zero, low)",
        weights={
            "one": np.ones(1, np.int64),
            "zero": np.zeros((), np.float32),
            "low": np.array(np.finfo(np.float32).min, np.float32),
        },
    )
    program = numerics(model, {"p": padding()})
    (node,) = (node for node in program.main.graph if node.op_type == "Attention")
    assert node.inputs[3] is not None and node.inputs[3].dtype == ir.DataType.FLOAT
    infer_shapes(program.main)
    assert tuple(node.inputs[3].shape)[1:3] == (1, 1)  # type: ignore[arg-type]


def test_a_causal_mask_becomes_an_attribute() -> None:
    body = (
        "length = Shape<start = 1, end = 2>(q) one = Constant<value_int = 1>() zero = Constant<value_int = 0>()"
        " n = Squeeze(length) count = Range(zero, n, one)"
        " ax_q = Constant<value_ints = [0, 1, 3]>() ax_k = Constant<value_ints = [0, 1, 2]>()"
        " rows = Unsqueeze(count, ax_q) columns = Unsqueeze(count, ax_k) m = LessOrEqual(columns, rows)"
    )
    program = numerics(source("", body), {})
    ops = Counter(node.op_type for node in program.main.graph)
    assert ops == {"Attention": 1}
    (node,) = program.main.graph
    assert node.attributes.get_int("is_causal") == 1 and len([v for v in node.inputs if v is not None]) == 3


def test_what_is_left() -> None:
    def declines(model: ir.Model, reason: str, target: str = TARGET) -> None:
        check_declines(PASS, program_of(model, target), reason, count=1)

    declines(source(", bool[n, 1, s, s] m", ""), "neither causal nor the same for all queries")
    declines(source(", bool[n, 4, 1, s] m", ""), "differs by head")
    declines(source(", bool[n, 1, 1, s] m", ""), "its mask is narrow")
    declines(source(", bool[n, 1, s, s] m", ""), "lowers masks itself", "ort-cpu")
    declines(source(", bool[n, 1, s, s] m", "", heads=HEADS + ", softcap = 2.0"), "its scores are capped")
