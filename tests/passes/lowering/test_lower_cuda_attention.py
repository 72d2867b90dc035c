"""Attention in the forms of the CUDA provider; numbers on ONNX Runtime's CPU kernels of the same operators."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from planish.ir.infer import infer_shapes
from planish.ir.printer import parse_model
from planish.passes.testing import apply_pass, check_declines, check_numerics, program_of

PASS = "lower-cuda-attention"
PROJECTED = "q = MatMul(x, wq) k = MatMul(x, wk) vv = MatMul(x, wv) v = Add(vv, bv)"
SIZES = "q_num_heads = 4, kv_num_heads = 4, scale = 0.4"


def source(
    inputs="float[2, 6, 8] x", body="", attention=SIZES, weights="", opset=23, dtype="float", mask="", shape="2, 6, 8"
) -> ir.Model:
    projected = body or PROJECTED
    text = f"""<ir_version: 10, opset_import: ["" : {opset}]>
      g ({inputs.replace("float", dtype)}) => ({dtype}[{shape}] y)
      {{ {projected}  y = Attention<{attention}>(q, k, v{mask}) }}"""
    model = parse_model(text)
    random = np.random.default_rng(0)
    kv = 4 if "kv_num_heads = 2" in attention else 8
    for name, dims in {"wq": (8, 8), "wk": (8, kv), "wv": (8, kv), "bv": (kv,)}.items():
        found = [v for node in model.graph for v in node.inputs if v is not None and v.name == name]
        if found:
            array = (0.3 * random.standard_normal(dims)).astype("f2" if dtype == "float16" else "f4")
            value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
            value.type, value.shape = ir.TensorType(value.const_value.dtype), ir.Shape(dims)
            model.graph.register_initializer(value)
            for item in found:
                item.replace_all_uses_with(value)
    infer_shapes(model)
    return model


def lowered(model, count=None):
    program = program_of(model, "ort-cuda")
    result = apply_pass(["infer-shapes", PASS, "eliminate-dead-code"], program)
    return program, Counter(node.op_type for node in program.main.graph), result


def numerics(model, inputs):
    check_numerics([PASS], program_of(model, "ort-cuda"), inputs)


X = np.random.default_rng(1).standard_normal((2, 6, 8)).astype("f4")


def test_projections_are_packed():
    program, ops, _ = lowered(source())
    assert ops == {"Attention": 1}
    node = next(iter(program.main.graph))
    assert node.domain == "com.microsoft" and node.inputs[1].shape == (8, 24) and node.inputs[2].shape == (24,)
    assert not node.inputs[2].const_value.numpy()[:16].any() and node.inputs[2].const_value.numpy()[16:].any()
    assert node.attributes.get_float("scale") == pytest.approx(0.4) and not node.attributes.get_int("unidirectional")
    numerics(source(), {"x": X})


def test_of_different_values():
    text = source("float[2, 6, 8] x, float[2, 9, 8] z", "q = MatMul(x, wq) k = MatMul(z, wk) v = MatMul(z, wv)")
    assert lowered(text)[1] == {"MatMul": 3, "MultiHeadAttention": 1}
    numerics(text, {"x": X, "z": np.random.default_rng(2).standard_normal((2, 9, 8)).astype("f4")})


@pytest.mark.parametrize("form", ["attribute", "bool", "float"])
def test_causal(form):
    model = source(attention=SIZES + ", is_causal = 1") if form == "attribute" else source()
    if form != "attribute":
        seen = np.tri(6) > 0
        array = seen if form == "bool" else np.where(seen, 0, np.finfo("f4").min).astype("f4")
        value = ir.Value(name="m", const_value=ir.tensor(array, name="m"))
        value.type, value.shape = ir.TensorType(value.const_value.dtype), ir.Shape((6, 6))
        model.graph.register_initializer(value)
        node = next(n for n in model.graph if n.op_type == "Attention")
        node.resize_inputs(4)
        node.replace_input_with(3, value)
    program, ops, _ = lowered(model)
    assert ops == {"Attention": 1}
    assert next(iter(program.main.graph)).attributes.get_int("unidirectional") == 1
    numerics(model, {"x": X})


def test_padding_becomes_a_bias():
    more = " s = Constant<value_ints = [2, 1, 6, 6]>() e = Expand(m, s)"
    model = source("float[2, 6, 8] x, bool[2, 1, 1, 6] m", PROJECTED + more, mask=", e")
    ops = lowered(model)[1]
    assert ops["Attention"] == 1 and ops["Where"] == 1
    mask = np.ones((2, 1, 1, 6), bool)
    mask[1, ..., 4:] = False
    numerics(model, {"x": X, "m": mask})


@pytest.mark.parametrize("shape", [(2, 1, 6, 6), (1, 4, 6, 6)])
def test_a_mask_to_add(shape):
    model = source(f"float[2, 6, 8] x, float[{', '.join(map(str, shape))}] m", mask=", m")
    assert lowered(model)[1] == {"Attention": 1}
    numerics(model, {"x": X, "m": np.random.default_rng(3).standard_normal(shape).astype("f4")})


GROUPED = "q_num_heads = 4, kv_num_heads = 2, scale = 0.4, is_causal = 1"


def rotated(attention=GROUPED, table="float16[2, 6, 1]") -> ir.Model:
    body = """a = MatMul(x, wq) q = RotaryEmbedding<num_heads = 4>(a, cos, sin)
      b = MatMul(x, wk) k = RotaryEmbedding<num_heads = 2>(b, cos, sin) v = MatMul(x, wv)"""
    model = source(body=body, attention=attention, dtype="float16")
    angles = np.arange(6)[None, :, None].repeat(2, 0) * np.ones(1)
    for name, array in (("cos", np.cos(angles)), ("sin", np.sin(angles))):
        value = ir.Value(name=name, const_value=ir.tensor(array.astype("f2"), name=name))
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT16), ir.Shape(array.shape)
        for node in model.graph:
            for index, old in enumerate(node.inputs):
                if old is not None and old.name == name and old is not value:
                    node.replace_input_with(index, value)
        model.graph.register_initializer(value)
    return model


def test_grouped_heads_with_rotated_positions():
    program, ops, _ = lowered(rotated())
    assert ops == {"MatMul": 1, "GroupQueryAttention": 1}
    node = list(program.main.graph)[-1]
    assert node.attributes.get_int("do_rotary") == 1 and node.inputs[1] is None
    assert node.inputs[5].const_value.numpy().tolist() == [5, 5] and node.inputs[7].shape == (6, 1)


def test_what_has_no_form():
    check_declines(PASS, program_of(source(), "ort-cpu"), "this is for 'ort-cuda'", count=1)
    model = source("float[2, 6, 8] x, bool[2, 4, 6, 6] m", mask=", m")
    check_declines(PASS, program_of(model, "ort-cuda"), "neither causal nor the same for all queries")
    model = source("float[2, 6, 8] x, bool[2, 4, 1, 6] m", mask=", m")
    check_declines(PASS, program_of(model, "ort-cuda"), "differs by head")
    check_declines(PASS, program_of(source(attention=SIZES + ", softcap = 2.0"), "ort-cuda"), "its scores are capped")
    grouped = source(attention="q_num_heads = 4, kv_num_heads = 2, scale = 0.4")
    check_declines(PASS, program_of(grouped, "ort-cuda"), "only causal attention in half precision has a form")
    body = "q = MatMul(x, wq) k = MatMul(z, wk) v = MatMul(z, wv)"
    model = source("float[2, 6, 8] x, float[2, 9, 8] z", body, SIZES + ", is_causal = 1")
    check_declines(PASS, program_of(model, "ort-cuda"), "not known to be as many")
