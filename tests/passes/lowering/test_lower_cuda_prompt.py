"""Prompts whose attention gives the caches; numbers on ONNX Runtime's CPU kernels."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from planish.ir.causal_lm import DECODE, PREFILL, Facts
from planish.ir.infer import infer_shapes
from planish.ir.printer import parse_model
from planish.ir.program import Program
from planish.ir.target import Target
from planish.passes.testing import apply_pass, check_declines

PASS = "lower-cuda-prompt"
HEADS, GROUPS, SIZE, WIDTH = 4, 2, 16, 24


def source(rotate=True, dtype="float16", positions=40, attention="is_causal = 1", angles=8, extra="", swapped=False):
    """A program whose `prefill` is one attention behind its projections."""
    number = {"float16": 10, "float": 1}[dtype]
    turned = f"""ids = Shape(input_ids) count = Gather(ids, at1) end = Squeeze(count) at = Range(zero, end, step)
      f = Cast<to = 1>(at) up = Unsqueeze(f, first) angle = Mul(up, inverse) wide = Unsqueeze(angle, at0)
      size0 = Shape<start = 0, end = 1>(input_ids) sizes = Concat<axis = 0>(size0, ones)
      c1 = Cos(wide) s1 = Sin(wide) c2 = Expand(c1, sizes) s2 = Expand(s1, sizes)
      c = Cast<to = {number}>(c2) s = Cast<to = {number}>(s2)"""
    flat = f"""q = RotaryEmbedding<num_heads = {HEADS}>(qp, c, s) k = RotaryEmbedding<num_heads = {GROUPS}>(kp, c, s)
      kr = Reshape(kp, shape) kt = Transpose<perm = [0, 2, 1, 3]>(kr) present_0_key = RotaryEmbedding(kt, c, s)"""
    plain = """q = Identity(qp) k = Identity(kp) kr = Reshape(kp, shape)
      present_0_key = Transpose<perm = [0, 2, 1, 3]>(kr)"""
    q, kv = HEADS * SIZE, GROUPS * SIZE
    cache = f"{dtype}[batch, {GROUPS}, tokens, {SIZE}]"
    text = f"""<ir_version: 10, opset_import: ["" : 23]>
      g (int64[batch, tokens] input_ids, {dtype}[batch, tokens, {WIDTH}] x)
      => ({dtype}[batch, tokens, {q}] y, {cache} present_0_key, {cache} present_0_value)
      <int64 zero = {{0}}, int64 step = {{1}}, int64[1] at0 = {{0}}, int64[1] at1 = {{1}}, int64[1] first = {{1}},
       int64[2] ones = {{1, 1}}, int64[4] shape = {{0, 0, {GROUPS}, {SIZE}}}> {{
      qp = MatMul(x, wq)  kp = MatMul(x, wk)  v = MatMul(x, {"wk" if swapped else "wv"})
      {(turned + flat) if rotate else plain}
      vr = Reshape(v, shape)  present_0_value = Transpose<perm = [0, 2, 1, 3]>(vr)
      y = Attention<q_num_heads = {HEADS}, kv_num_heads = {GROUPS}, scale = 0.3, {attention}>(q, k, v{extra}) }}"""
    model = parse_model(text)
    random = np.random.default_rng(0)
    shapes = {"wq": (WIDTH, q), "wk": (WIDTH, kv), "wv": (WIDTH, kv)}
    constants = {name: 0.2 * random.standard_normal(dims) for name, dims in shapes.items()}
    constants = {name: array.astype("f2" if dtype == "float16" else "f4") for name, array in constants.items()}
    constants["inverse"] = (10000.0 ** (-np.arange(angles) / angles)).astype("f4")
    for name, array in constants.items():
        for item in {v for node in model.graph for v in node.inputs if v is not None and v.name == name}:
            value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
            value.type, value.shape = ir.TensorType(value.const_value.dtype), ir.Shape(array.shape)
            model.graph.register_initializer(value)
            item.replace_all_uses_with(value)
    infer_shapes(model)
    step = parse_model("""<ir_version: 10, opset_import: ["" : 23]>
      g (int64[batch] lengths) => (int64[batch] y) { y = Identity(lengths) }""")
    return Program({PREFILL: model, DECODE: step}, Target.parse("ort-cuda"), Facts(positions).to_provenance())


def run(program, x):
    from planish.runtime.ort import compile_ort

    return compile_ort(program.entry(PREFILL), Target()).run(x)


@pytest.mark.parametrize("rotate", [True, False])
def test_same_numbers(rotate):
    before, after = source(rotate), source(rotate)
    apply_pass(["remove-no-ops", PASS, "eliminate-dead-code"], after)
    ops = Counter(node.op_type for node in after.entry(PREFILL).graph)
    assert ops["MatMul"] == ops["GroupQueryAttention"] == 1 and not ops["Attention"] + ops["Transpose"] + ops["Cos"]
    assert [v.name for v in after.entry(PREFILL).graph.outputs] == ["y", "present_0_key", "present_0_value"]
    for batch, tokens in ((2, 7), (1, 1), (3, 40)):
        x = np.random.default_rng(tokens).standard_normal((batch, tokens, WIDTH)).astype("f2")
        feeds = {"input_ids": np.zeros((batch, tokens), np.int64), "x": x}
        want, got = run(before, feeds), run(after, feeds)
        for name in want:
            np.testing.assert_allclose(got[name], want[name], rtol=5e-3, atol=5e-3)
    assert np.abs(want["y"]).max() > 0.1


def test_declines():
    check_declines(PASS, source(dtype="float"), "not causal in half precision")
    check_declines(PASS, source(attention="is_causal = 0"), "not causal in half precision")
    check_declines(PASS, source(positions=None), "no end")
    check_declines(PASS, source(angles=6), "multiple of 8 angles")
    elsewhere = source()
    elsewhere.target = Target()
    check_declines(PASS, elsewhere, "this is for 'ort-cuda'")
    alone = Program({"main": source().entry(PREFILL)}, Target.parse("ort-cuda"))
    check_declines(PASS, alone, "no prompts for a cache")
