"""Patches of images as rows of one product."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from planish.ir.infer import infer_shapes
from planish.ir.printer import parse_model
from planish.passes.defaults import default_pipeline
from planish.passes.testing import apply_pass, check_declines, check_numerics, program_of

PASS = "lower-patch-embedding"


def source(batch="2", image=(12, 8), patch=(4, 2), settings="", bias=True, flat=None, perm="0, 2, 1", window=None):
    high, wide = image[0] // patch[0], image[1] // patch[1]
    rows = flat or f"0, 5, {high * wide}"
    strides = f"strides = [{patch[0]}, {patch[1]}]"
    given = "x, w, b" if bias else "x, w"
    text = f"""<ir_version: 10, opset_import: ["" : 23]> g
      (float[{batch}, 3, {image[0]}, {image[1]}] x) => (float[A, B, C] y)
      {{ c = Conv<{strides}{settings}>({given})
         s = Constant<value_ints = [{rows}]>() r = Reshape(c, s) y = Transpose<perm = [{perm}]>(r) }}"""
    model = parse_model(text)
    random = np.random.default_rng(0)
    for name, shape in {"w": (5, 3, *(window or patch)), "b": (5,)}.items():
        found = {v for node in model.graph for v in node.inputs if v is not None and v.name == name}
        for item in found:
            tensor = ir.tensor(random.standard_normal(shape).astype("f4"), name=name)
            value = ir.Value(name=name, const_value=tensor)
            value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
            model.graph.register_initializer(value)
            item.replace_all_uses_with(value)
    infer_shapes(model)
    return model


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", ["2", "N"])
@pytest.mark.parametrize(("image", "patch"), [((12, 8), (4, 2)), ((6, 6), (3, 3)), ((5, 4), (1, 4)), ((4, 4), (4, 4))])
def test_patches_are_rows_of_a_product(image, patch, batch, bias):
    model = source(batch, image, patch, bias=bias)
    program = program_of(model, "ort-cuda")
    apply_pass([PASS, "eliminate-dead-code"], program)
    ops = [node.op_type for node in program.main.graph if node.op_type != "Constant"]
    assert ops == ["Reshape", "Transpose", "Reshape", "MatMul", *(["Add"] if bias else [])]
    x = np.random.default_rng(1).standard_normal((2, 3, *image)).astype("f4")
    check_numerics([PASS], program_of(model, "ort-cuda"), {"x": x})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image": (13, 8)}, "do not tile"),
        ({"settings": ", pads = [1, 0, 1, 0]"}, "pads the image"),
        ({"window": (3, 2)}, "overlap, leave gaps"),
        ({"settings": ", dilations = [1, 2]", "window": (4, 1)}, "overlap, leave gaps"),
        ({"flat": "0, 12, 5"}, "not read as rows"),
    ],
)
def test_what_it_leaves(change, reason):
    check_declines(PASS, program_of(source(**change), "ort-cuda"), reason)


def test_where_it_acts():
    check_declines(PASS, program_of(source()), "as fast")
    assert PASS in default_pipeline("ort-cuda") and PASS not in default_pipeline("ort-cpu")
