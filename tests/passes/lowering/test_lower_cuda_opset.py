"""lower-cuda-opset: opset 21 where that alone gives an operator a kernel on GPUs, and nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest

from planish.passes.testing import apply_pass, canonical_text, check_declines, program_of, run_reference

PASS = "lower-cuda-opset"
NET = """<ir_version: 10, opset_import: ["" : 23]> g (float[1, 2, 8, 8] x) => (float[1, 2, 3, 3] y) {
  p = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(x) e = Elu<alpha = 0.5>(p)
  y = AveragePool<kernel_shape = [2, 2]>(e) }"""


def test_the_opset_and_nothing_else():
    program = program_of(NET, "ort-cuda")
    x = np.random.default_rng(0).standard_normal((1, 2, 8, 8)).astype("f4")
    before, want = canonical_text(program), run_reference(program, {"x": x})
    result = apply_pass(PASS, program)
    assert (result.fired, program.main.opset_imports[""]) == (2, 21)  # the pool and the activation
    assert canonical_text(program) == before.replace('"" : 23', '"" : 21')
    np.testing.assert_array_equal(run_reference(program, {"x": x})["y"], want["y"])
    assert apply_pass(PASS, program).fired == 0


def test_branches_are_of_the_same_opset():
    text = """<ir_version: 10, opset_import: ["" : 23]> g (bool c, float[4] x) => (float[4] y) {
      y = If(c) <then_branch = a () => (float[4] t) { t = Elu(x) },
                 else_branch = b () => (float[4] f) { f = Neg(x) }> }"""
    program = program_of(text, "ort-cuda")
    assert apply_pass(PASS, program).fired == 1 and program.main.opset_imports[""] == 21
    x = np.arange(-2, 2, dtype="f4")
    np.testing.assert_array_equal(run_reference(program, {"c": np.array(False), "x": x})["y"], -x)


@pytest.mark.parametrize(
    ("tail", "reason"),
    [
        ("y = RMSNormalization<axis = -1>(e, s)", "RMSNormalization is not an operator of opset 21"),
        ("c = Cast<to = 16>(e) y = Cast<to = 1>(c)", "Cast in bfloat16 may be newer than opset 21"),
        ("o = Constant<value_float = 1.0>() i = Cast<to = 3>(e) y = DequantizeLinear<output_dtype = 1>(i, o)",
         "DequantizeLinear has no 'output_dtype' at opset 21"),
    ],
)  # fmt: skip
def test_declines(tail, reason):
    text = f"""<ir_version: 10, opset_import: ["" : 23]> g (float[2, 4] x, float[4] s) => (float[2, 4] y)
      {{ e = Elu(x) {tail} }}"""
    check_declines(PASS, program_of(text, "ort-cuda"), reason)


def test_where_there_is_nothing_to_gain():
    assert apply_pass(PASS, program_of(NET, "ort-cpu")).fired == 0
    plain = NET.replace("MaxPool", "AveragePool").replace("Elu<alpha = 0.5>", "Relu")
    assert apply_pass(PASS, program_of(plain, "ort-cuda")).fired == 0
    assert apply_pass(PASS, program_of(NET.replace('"" : 23', '"" : 20'), "ort-cuda")).fired == 0
