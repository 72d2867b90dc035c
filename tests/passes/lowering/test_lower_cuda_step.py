"""Steps that rotate positions and read one product; numbers on ONNX Runtime's CPU kernel of the same operator."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from planish.ir.infer import infer_shapes
from planish.ir.printer import parse_model
from planish.ir.target import Target
from planish.passes.testing import apply_pass, check_declines, program_of

PASS = "lower-cuda-step"
HEADS, GROUPS, SIZE, WIDTH = 4, 2, 16, 24


def source(rotate=True, shift=False, angles=8, positions=50, tokens=1):
    """A program with the angles, or without; in float16."""
    turned = """at = Unsqueeze(lengths, one) f = Cast<to = 1>(at) up = Unsqueeze(f, two) angle = Mul(up, inverse)
      c32 = Cos(angle) s32 = Sin(angle) c = Cast<to = 10>(c32) s = Cast<to = 10>(s32)"""
    split = """{x}r = Reshape({x}p, {x}shape) {x}t = Transpose<perm = [0, 2, 1, 3]>({x}r)
      {x}e = RotaryEmbedding({x}t, c, s)  {x}b = Transpose<perm = [0, 2, 1, 3]>({x}e)
      {x} = Reshape({x}b, {x}flat)"""
    q, kv = HEADS * SIZE, GROUPS * SIZE
    text = f"""<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>
      g (float16[batch, {tokens}, {WIDTH}] x, float16[batch, {GROUPS}, room, {SIZE}] past_0_key,
         float16[batch, {GROUPS}, room, {SIZE}] past_0_value, int64[batch] lengths)
      => (float16[batch, {tokens}, {q}] y, float16[batch, {GROUPS}, room, {SIZE}] present_0_key,
          float16[batch, {GROUPS}, room, {SIZE}] present_0_value)
      <int64[1] one = {{1}}, int64[1] two = {{2}}, int64[4] qshape = {{0, {tokens}, {HEADS}, {SIZE}}},
       int64[4] kshape = {{0, {tokens}, {GROUPS}, {SIZE}}}, int64[3] qflat = {{0, {tokens}, {q}}},
       int64[3] kflat = {{0, {tokens}, {kv}}}> {{
      {turned if rotate else ""}
      {"qq = MatMul(x, wq) qp = Add(qq, bq)" if shift else "qp = MatMul(x, wq)"}
      kp = MatMul(x, wk)  v = MatMul(x, wv)
      {split.format(x="q") + split.format(x="k") if rotate else "q = Identity(qp) k = Identity(kp)"}
      held = Cast<to = 6>(lengths)  size = Shape<start = 2, end = 3>(past_0_key)  room32 = Cast<to = 6>(size)
      y, present_0_key, present_0_value = com.microsoft.GroupQueryAttention
        <num_heads = {HEADS}, kv_num_heads = {GROUPS}, scale = 0.3>
        (q, k, v, past_0_key, past_0_value, held, room32) }}"""
    model = parse_model(text)
    random = np.random.default_rng(0)
    arrays = {"wq": (WIDTH, q), "wk": (WIDTH, kv), "wv": (WIDTH, kv), "bq": (q,)}
    constants = {name: (0.2 * random.standard_normal(dims)).astype("f2") for name, dims in arrays.items()}
    constants["inverse"] = (10000.0 ** (-np.arange(angles) / angles)).astype("f4")
    for name, array in constants.items():
        found = {v for node in model.graph for v in node.inputs if v is not None and v.name == name}
        for item in found:
            value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
            value.type, value.shape = ir.TensorType(value.const_value.dtype), ir.Shape(array.shape)
            model.graph.register_initializer(value)
            item.replace_all_uses_with(value)
    infer_shapes(model)
    program = program_of(model, "ort-cuda")
    if positions is not None:
        program.provenance["max_positions"] = str(positions)
    return program


def inputs(batch, room, seed=0):
    random = np.random.default_rng(seed)
    shape = (batch, GROUPS, room, SIZE)
    found = {name: random.standard_normal(shape) for name in ("past_0_key", "past_0_value")}
    found["x"] = random.standard_normal((batch, 1, WIDTH))
    lengths = random.integers(0, room, batch)
    lengths[0] = room - 1
    return {name: value.astype("f2") for name, value in found.items()} | {"lengths": lengths}


def run(program, x):
    from planish.runtime.ort import compile_ort

    return compile_ort(program.main, Target()).run(x)


@pytest.mark.parametrize("rotate, shift", [(True, False), (True, True), (False, False), (False, True)])
def test_same_numbers(rotate, shift):
    before, after = source(rotate, shift), source(rotate, shift)
    apply_pass(["remove-no-ops", PASS, "eliminate-dead-code"], after)
    ops = Counter(node.op_type for node in after.main.graph)
    assert +ops == +Counter({"MatMul": 1, "Add": int(shift), "GroupQueryAttention": 1, "Cast": 2, "Shape": 1})
    for batch, room in ((3, 11), (1, 1), (2, 50)):
        x = inputs(batch, room, room)
        want, got = run(before, x), run(after, x)
        held = np.arange(room)[:, None] <= x["lengths"][:, None, None, None]
        for name in want:
            counts = held if name != "y" else 1
            np.testing.assert_allclose(got[name] * counts, want[name] * counts, rtol=4e-3, atol=4e-3)
    assert np.abs(want["y"]).max() > 0.1


def test_declines():
    check_declines(PASS, source(positions=None), "no end")
    check_declines(PASS, source(angles=6), "multiple of 8 angles")
    check_declines(PASS, source(tokens=2), "no step of one token")
    other = source()
    other.target = Target()
    check_declines(PASS, other, "this is for 'ort-cuda'")
    done = source()
    apply_pass(PASS, done)
    check_declines(PASS, done, "reads one product already")


def test_products_of_different_values_stay_apart():
    program = source()
    product = next(n for n in program.main.graph if n.op_type == "MatMul" and n.outputs[0].name == "v")
    twice = ir.node("Add", [product.inputs[0], product.inputs[0]])
    twice.outputs[0].type, twice.outputs[0].shape = product.inputs[0].type, product.inputs[0].shape
    twice.outputs[0].name = "twice"
    program.main.graph.insert_before(product, twice)
    product.replace_input_with(0, twice.outputs[0])
    before = run(program, inputs(2, 9))
    apply_pass([PASS, "eliminate-dead-code"], program)
    ops = Counter(node.op_type for node in program.main.graph)
    assert ops["MatMul"] == 3 and not ops["RotaryEmbedding"]
    np.testing.assert_allclose(run(program, inputs(2, 9))["y"], before["y"], rtol=4e-3, atol=4e-3)
