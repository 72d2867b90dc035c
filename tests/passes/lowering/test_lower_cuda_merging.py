"""Merging and the attention around it in the forms that have kernels on GPUs; numbers on ONNX Runtime's CPU kernels."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from planish.ir.infer import infer_shapes
from planish.ir.printer import parse_model
from planish.passes.defaults import default_pipeline
from planish.passes.testing import apply_pass, check_declines, check_numerics, check_untouched, program_of

PASS, TARGET = "lower-cuda-merging", "ort-cuda:kernels"
WEIGHTS = {"wq": (128, 128), "wk": (128, 128), "wv": (128, 128), "wo": (128, 128)}
VECTORS = dict.fromkeys(("bq", "bk", "bv", "bo", "g", "b"), (128,))
PROJECTED = (
    """hq = MatMul(h, wq) q = Add(hq, bq) hk = MatMul(h, wk) k = Add(hk, bk) hv = MatMul(h, wv) v = Add(hv, bv)"""
)
MASK = "logs = Log(sizes) narrow = Unsqueeze(logs, axes) wide = Expand(narrow, full) mask = Cast<to = 10>(wide)"
HEADS = "q_num_heads = 2, kv_num_heads = 2, scale = 0.2"
BEHIND = "out = MatMul(a, wo) biased = Add(out, bo) total = Add(biased, x)"
MERGE = "y, s, i = planish.MergeTokens<r = 3, protected = 1, heads = 2>(total, k, sizes)"
NORM = "z = LayerNormalization<epsilon = 1e-6>(y, g, b)"


def source(mask=MASK, merge=MERGE, behind=BEHIND, norm=NORM, heads=HEADS, dtype="float16", more=""):
    given = ", mask" if mask else ""
    behind, norm = (behind, norm) if merge else ("", "")
    outputs = f"{dtype}[2, 9, 128] z, {dtype}[2, 9, 128] y, float[2, 9] s" if merge else f"{dtype}[2, 12, 128] a"
    text = f"""<ir_version: 10, opset_import: ["" : 23, "planish" : 1]>
      g ({dtype}[2, 12, 128] x, {dtype}[2, 12, 128] h, float[2, 12] sizes) => ({outputs}{more and ", " + more})
      {{ {PROJECTED} {mask} a = Attention<{heads}>(q, k, v{given}) {behind} {merge} {norm} }}"""
    model = parse_model(text)
    random, kind = np.random.default_rng(0), "f2" if dtype == "float16" else "f4"
    arrays = {name: (random.standard_normal(shape) / 11).astype(kind) for name, shape in (WEIGHTS | VECTORS).items()}
    arrays |= {"axes": np.array([1, 2]), "full": np.array([12, 12])}
    for name, array in arrays.items():
        found = {v for node in model.graph for v in node.inputs if v is not None and v.name == name}
        if found:
            value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
            value.type, value.shape = ir.TensorType(value.const_value.dtype), ir.Shape(array.shape)
            model.graph.register_initializer(value)
            for item in found:
                item.replace_all_uses_with(value)
    infer_shapes(model)
    return model


def lowered(model):
    program = program_of(model, TARGET)
    result = apply_pass([PASS, "eliminate-dead-code"], program)
    return program, Counter(node.op_type for node in program.main.graph), result


def numerics(model, kind="f2"):
    random = np.random.default_rng(1)
    feeds = {name: random.standard_normal((2, 12, 128)).astype(kind) for name in "xh"}
    feeds["sizes"] = random.integers(1, 4, (2, 12)).astype("f4")
    check_numerics([PASS], program_of(model, TARGET), feeds)


def node_of(program, op):
    return next(node for node in program.main.graph if node.op_type == op)


def test_attention_and_merging_read_one_product():
    program, ops, _ = lowered(source())
    assert ops == {"MatMul": 2, "Log": 1, "PackedAttentionKeyBias": 1, "AddMergeTokensNorm": 1}
    attention, merge = node_of(program, "PackedAttentionKeyBias"), node_of(program, "AddMergeTokensNorm")
    assert attention.inputs[0] is merge.inputs[3] and attention.inputs[1].shape == (384,)
    settings = {name: merge.attributes.get_int(name) for name in ("r", "protected", "heads", "size", "first")}
    assert settings == {"r": 3, "protected": 1, "heads": 2, "size": 64, "first": 128}
    assert merge.attributes.get_float("epsilon") == pytest.approx(1e-6)
    assert [v.name for v in merge.inputs[:1]] == ["x"] and merge.inputs[2].name == "bo"
    shift = attention.inputs[1].const_value.numpy()[128:256].reshape(2, 64)
    np.testing.assert_allclose(merge.inputs[4].const_value.numpy(), shift.mean(0, dtype="f8"), rtol=1e-6)
    numerics(source())


def test_before_the_first_merge_there_is_no_bias():
    _, ops, _ = lowered(source(mask=""))
    assert ops == {"MatMul": 2, "PackedAttention": 1, "AddMergeTokensNorm": 1}
    numerics(source(mask=""))


def test_short_attention_reads_one_product_too():
    model = source(mask="", merge="")
    _, ops, _ = lowered(model)
    assert ops == {"MatMul": 1, "PackedAttention": 1}
    numerics(model)
    assert lowered(source(mask="", merge="", more="float16[2, 12, 128] k"))[1]["Attention"] == 1


def test_the_logarithms_of_sizes_come_with_them():
    model = source(norm=NORM + " later = Log(s)", more="float[2, 9] later")
    program, ops, _ = lowered(model)
    assert ops["Log"] == 1 and program.main.graph.outputs[3].producer() is node_of(program, "AddMergeTokensNorm")
    numerics(model)


def test_by_energy():
    merge = MERGE.replace("MergeTokens<", "MergeTokensEnergy<margin = 0.1, ")
    program, ops, _ = lowered(source(merge=merge))
    assert ops["AddMergeTokensEnergyNorm"] == 1
    assert node_of(program, "AddMergeTokensEnergyNorm").attributes.get_float("margin") == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("change", "ops"),
    [
        # What the fused operator has not is left, and so are the keys by themselves.
        ({"merge": MERGE.replace("MergeTokens<", "MergeTokensMaxNorm<")}, {"MergeTokensMaxNorm": 1, "MatMul": 4}),
        ({"more": "float16[2, 12, 128] total"}, {"MergeTokens": 1, "MatMul": 4}),
        ({"more": "float16[2, 12, 128] k"}, {"AddMergeTokensNorm": 1, "MatMul": 4}),
        ({"behind": "out = MatMul(a, wo) total = Add(x, out)"}, {"AddMergeTokensNorm": 1, "MatMul": 2}),
        ({"norm": "z = Neg(y)"}, {"MergeTokens": 1, "MatMul": 4}),
        ({"merge": ""}, {"PackedAttentionKeyBias": 1, "MatMul": 1}),
    ],
)
def test_places_that_have_less(change, ops):
    model = source(**change)
    found = lowered(model)[1]
    assert {op: found[op] for op in ops} == ops
    assert found["FlashAttentionKeyBias"] + found["PackedAttentionKeyBias"] == 1
    numerics(model)


def test_what_is_left_alone():
    check_untouched(f"{PASS}{{longest=11}}", program_of(source(mask="", merge=""), TARGET))
    check_untouched(PASS, program_of(source(mask="", merge=""), "ort-cuda"))
    check_untouched(PASS, program_of(source(mask="", merge="", dtype="float"), TARGET))
    check_untouched(PASS, program_of(source(mask="", merge="", heads=HEADS + ", is_causal = 1"), TARGET))
    check_declines(PASS, program_of(source(dtype="float", mask=MASK.replace("10", "1")), TARGET), "not float16")
    check_declines(PASS, program_of(source(heads=HEADS.replace("2,", "4,")), TARGET), "heads are not of the sizes")
    check_declines(PASS, program_of(source(heads=HEADS + ", is_causal = 1"), TARGET), "causal")
    check_declines(PASS, program_of(source(), "ort-cuda"), "has no such kernels")
    assert PASS in default_pipeline(TARGET) and PASS not in default_pipeline("ort-cuda")
