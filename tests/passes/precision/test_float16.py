"""float16: where half precision begins, what stays float32, and that the program's own types stay."""

from __future__ import annotations

import numpy as np
import pytest

import planish
from planish.driver import resolve_pipeline
from planish.ir.infer import infer_shapes
from planish.ir.printer import parse_model
from planish.ir.program import Program
from planish.ir.target import Target
from planish.passes.testing import apply_pass, canonical_text, check_declines, check_rewrite, program_of, run_reference

PASS = "float16"
HEADER = '<ir_version: 10, opset_import: ["" : 23]> g '


def gpu(text: str):
    return program_of(HEADER + text, "ort-cuda")


def test_a_product_and_what_follows():
    before = gpu("""(float[2, 2] x) => (float[2, 2] y)
      <float[2, 2] w = {1, 2, 3, 4}, float[2] s = {1, 1}, float[2] b = {0, 1}> {
      h = Mul(x, x) p = MatMul(h, w) n = LayerNormalization<axis = -1>(p, s, b) y = Add(n, p) }""")
    after = gpu("""(float[2, 2] x) => (float[2, 2] y)
      <float16[2, 2] w = {15360, 16384, 16896, 17408}
      , float16[2] s = {15360, 15360}, float16[2] b = {0, 15360}> {
      h = Mul(x, x) c = Cast<to = 10>(h) p = MatMul(c, w) n = LayerNormalization<axis = -1>(p, s, b)
      z = Add(n, p) y = Cast<to = 1>(z) }""")
    check_rewrite(PASS, before, after, edits=3)


def test_what_leaves_the_range_stays():
    program = gpu("""(float[2, 2] x) => (float[2, 2] y) <float[2, 2] w = {1, 2, 3, 4}> {
      p = MatMul(x, w) e = Exp(p) y = Mul(e, p) }""")
    assert apply_pass(PASS, program).fired == 2
    text = canonical_text(program)
    assert text.count("Cast <to: int = 1>") == 2 and text.count("Cast <to: int = 10>") == 2


def test_masks_become_the_lowest_half():
    program = gpu("""(float[2, 2] x, bool[2, 2] m) => (float[2, 2] y)
      <float[2, 2] w = {1, 2, 3, 4}, float l = {-3.4e38}> {
      p = MatMul(x, w) q = Where(m, p, l) y = Softmax(q) }""")
    apply_pass(PASS, program)
    values = [v.const_value.numpy() for v in program.main.graph.initializers.values()]
    assert sorted(float(v.min()) for v in values)[0] == -65504 and all(v.dtype == np.float16 for v in values)
    x = np.ones((2, 2), "f4")
    got = run_reference(program, {"x": x, "m": np.array([[True, False], [True, True]])})["y"]
    np.testing.assert_allclose(got[0], [1, 0])


def test_integers_and_sizes_are_left():
    program = gpu("""(int64[2] i, float[4, 2] x) => (float[k] y, int64[2] z)
      <float[8, 4] w = {0,1,2,3,4,5,6,7,8,9,0,1,2,3,4,5,6,7,8,9,
      0,1,2,3,4,5,6,7,8,9,0,1}> {
      f = Cast<to = 1>(i) g = Mul(f, f) h = Floor(g) z = Cast<to = 7>(h)
      e = Gather(w, i) p = MatMul(e, x) s = Shape(p) t = ReduceProd<keepdims = 0>(s)
      n = Constant<value_ints = [-1]>() y = Reshape(p, n) }""")
    inputs = {"i": np.array([7, 3]), "x": np.eye(4, 2, dtype="f4")}
    want = run_reference(program, inputs)
    apply_pass(PASS, program)
    got = run_reference(program, inputs)
    np.testing.assert_array_equal(got["z"], want["z"])
    np.testing.assert_array_equal(got["y"], want["y"])
    assert got["y"].dtype == np.float32


def test_branches_keep_their_types():
    program = gpu("""(float[2, 2] x, bool c) => (float[2, 2] y) <float[2, 2] w = {1, 2, 3, 4}> {
      p = MatMul(x, w)
      q = If(c) <then_branch = g1 () => (float[2, 2] a) { a = Add(p, p) },
                 else_branch = g2 () => (float[2, 2] b) { b = MatMul(p, w) }>
      y = Relu(q) }""")
    inputs = [{"x": np.eye(2, dtype="f4"), "c": np.array(flag)} for flag in (True, False)]
    want = [run_reference(program, item)["y"] for item in inputs]
    apply_pass(PASS, program)
    for item, expected in zip(inputs, want, strict=True):
        np.testing.assert_allclose(run_reference(program, item)["y"], expected, rtol=1e-3)


def test_entries_share_weights():
    program = gpu("(float[2, 2] x) => (float[2, 2] y) <float[2, 2] w = {1, 2, 3, 4}> { y = MatMul(x, w) }")
    second = program.main.clone()
    for name, value in second.graph.initializers.items():
        value.const_value = program.main.graph.initializers[name].const_value
    program.entries["again"] = second
    apply_pass(PASS, program)
    assert len(program.weights) == 1


def test_only_for_gpus():
    text = HEADER + "(float[2, 2] x) => (float[2, 2] y) { y = MatMul(x, x) }"
    check_declines(PASS, program_of(text, "ort-cpu"), "is no faster in float16")


@pytest.mark.parametrize(
    ("target", "there"), [("ort-cuda:dtype=float16", 1), ("ort-cuda", 0), ("ort-cpu:dtype=float16", 0)]
)
def test_a_target_asks_for_it(target, there):
    assert [p.name for p in resolve_pipeline(None, Target.parse(target))].count(PASS) == there
    if there:
        both = resolve_pipeline(None, Target.parse(target), "float16,merge-tokens{r=2}")
        names = [p.name for p in both]
        assert names.count(PASS) == 1 and names.index("merge-tokens") < names.index(PASS) < names.index(
            "lower-cuda-attention"
        )
    assert planish.Budget().gates


W = "float[8, 8] w = {" + ", ".join(str(i % 3 - 1) for i in range(64)) + "}"
STEP = f"""<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>
  g (float[b, 1, 8] x, int64[b] lengths, float[b, 1, c, 8] past_0_key, float[b, 1, c, 8] past_0_value)
  => (float[b, 1, 8] y, float[b, 1, c, 8] present_0_key, float[b, 1, c, 8] present_0_value)
  <{W}> {{ q = MatMul(x, w) h = Cast<to = 6>(lengths) z = Constant<value_ints = [0]>() m = ReduceMax<keepdims = 1>(h, z)
    o = Constant<value_ints = [1]>() p = Cast<to = 6>(o) t = Add(m, p)
    y, present_0_key, present_0_value = com.microsoft.GroupQueryAttention<num_heads = 1, kv_num_heads = 1, scale = 0.3>
      (q, q, q, past_0_key, past_0_value, h, t) }}"""
PROMPT = f"""<ir_version: 10, opset_import: ["" : 23]>
  g (float[b, s, 8] x) => (float[b, s, 8] y, float[b, 1, s, 8] present_0_key, float[b, 1, s, 8] present_0_value)
  <{W.replace(" w ", " u ")}, int64[1] one = {{1}}> {{ k = MatMul(x, u) present_0_key = Unsqueeze(k, one)
    present_0_value = Unsqueeze(x, one) y = Identity(k) }}"""


def test_caches_have_the_type_of_their_step():
    entries = {"prefill": parse_model(PROMPT), "decode": parse_model(STEP)}
    program = Program(entries, Target.parse("ort-cuda"))
    for model in program.entries.values():
        infer_shapes(model)
    apply_pass(PASS, program)
    decode, prefill = (program.entry(name).graph for name in ("decode", "prefill"))
    values = [*decode.inputs[2:], *decode.outputs[1:], *prefill.outputs[1:]]
    assert {v.dtype.name for v in values} == {"FLOAT16"} and decode.outputs[0].dtype.name == "FLOAT"
    assert [v.name for v in prefill.outputs] == ["y", "present_0_key", "present_0_value"]
    casts = [n for n in decode if n.op_type == "Cast" and n.outputs[0].dtype.name.startswith("FLOAT")]
    assert len(casts) == 2  # of x and y: no cache is copied


def test_angles_stay():
    program = gpu("""(int64[2] i, float[2, 4] x) => (float[2, 4] y) <float[4, 4] w = {
      1,0,0,0,0,1,0,0,0,0,1,0,0,0,0,1}, float[1, 4] f = {1, 0.1, 0.01, 0.001}> {
      a = Cast<to = 1>(i) c = Constant<value_ints = [1]>() u = Unsqueeze(a, c) m = MatMul(u, f) s = Sin(m)
      p = MatMul(x, w) y = Mul(p, s) }""")
    apply_pass(PASS, program)
    inputs = {"i": np.array([4001, 77777]), "x": np.ones((2, 4), "f4")}
    got = run_reference(program, inputs)["y"]
    want = np.sin(np.array([[4001], [77777]]) * np.array([1, 0.1, 0.01, 0.001]))
    np.testing.assert_allclose(got, want, atol=8e-3)


def test_relational_layers_stay():
    """They are float32, with more inputs than their schema names."""
    from planish.ir.relational.models import rgcn
    from tests.ir.relational.graphs import random_graph
    from tests.runtime.cuda.test_relational_ops import model_of

    model = model_of(rgcn(8, 8), random_graph(1, (20,), 3, 60))
    assert apply_pass(PASS, program_of(model, "ort-cuda")).fired == 0


CODES = "uint8[2, 1, 32] codes = {" + ", ".join(str(100 + 7 * i % 60) for i in range(64)) + "}"
BITS = f"""<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>
  g (float[3, 32] x) => (float[3, 2] y) <{CODES}, float[2] scales = {{0.01, 0.02}}> {{
    p = com.microsoft.MatMulNBits<K = 32, N = 2, bits = 8, block_size = 32>(x, codes, scales) y = Tanh(p) }}"""


def test_products_with_codes_have_its_type_and_keep_their_codes():
    program = program_of(BITS, "ort-cuda")
    infer_shapes(program.main)
    x = np.random.default_rng(0).standard_normal((3, 32)).astype("f4")
    (want,) = run_reference(program, {"x": x}).values()
    assert apply_pass(PASS, program).fired == 2
    node = next(n for n in program.main.graph if n.op_type == "MatMulNBits")
    assert [v.dtype.name for v in (*node.inputs, *node.outputs)] == ["FLOAT16", "UINT8", "FLOAT16", "FLOAT16"]
    (got,) = run_reference(program, {"x": x}).values()
    assert 0 < np.linalg.norm(got - want) < 2e-3 * np.linalg.norm(want)


def test_a_program_in_half_precision_stays_as_it_is():
    text = BITS.replace("float[", "float16[").replace("{0.01, 0.02}", "{8479, 9503}")
    unused = text.replace("scales = ", "nobody = {1, 2}, float16[2] scales = ")
    program = program_of(unused, "ort-cuda")
    before = canonical_text(program)
    result = apply_pass(PASS, program)
    assert (result.modified, result.fired) == (False, 0) and canonical_text(program) == before
