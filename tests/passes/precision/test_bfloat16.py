"""bfloat16: as float16, with what has no kernel in it left in float32; refused where there is none."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

import planish
from planish.driver import resolve_pipeline
from planish.ir.errors import InputError, UnsupportedError
from planish.ir.machine import Gpu, Machine
from planish.ir.target import Target
from planish.passes.base import PassContext
from planish.passes.precision.bfloat16 import Bfloat16
from planish.passes.testing import apply_pass, canonical_text, check_rewrite, program_of
from planish.runtime import ort_cuda

HEADER = '<ir_version: 10, opset_import: ["" : 23]> g '
MACHINE = Machine(gpus=(Gpu("a GPU", 75, 4 << 30, 3 << 30),), driver="580.82", cuda=(13, 0),
                  providers=(ort_cuda.PROVIDER, "CPUExecutionProvider"), software={})  # fmt: skip


def gpu(text: str, target: str = "ort-cuda"):
    return program_of(HEADER + text, target)


def test_a_product_and_what_follows():
    before = gpu("""(float[2, 2] x) => (float[2, 2] y)
      <float[2, 2] w = {1, 2, 3, 4}, float[2] s = {1, 1}, float[2] b = {0, 1}> {
      h = Mul(x, x) p = MatMul(h, w) n = LayerNormalization<axis = -1>(p, s, b) y = Add(n, p) }""")
    after = gpu("""(float[2, 2] x) => (float[2, 2] y)
      <bfloat16[2, 2] w = {16256, 16384, 16448, 16512}
      , bfloat16[2] s = {16256, 16256}, bfloat16[2] b = {0, 16256}> {
      h = Mul(x, x) c = Cast<to = 16>(h) p = MatMul(c, w) n = LayerNormalization<axis = -1>(p, s, b)
      z = Add(n, p) y = Cast<to = 1>(z) }""")
    check_rewrite("bfloat16", before, after, edits=3)


def test_masks_stay_finite():
    program = gpu("""(float[2, 2] x, bool[2, 2] m) => (float[2, 2] y)
      <float[2, 2] w = {1, 2, 3, 4}, float l = {-3.4028235e38}> { p = MatMul(x, w) q = Where(m, p, l) y = Relu(q) }""")
    apply_pass("bfloat16", program)
    values = [v.const_value.numpy() for v in program.main.graph.initializers.values()]
    assert all(v.dtype == ml_dtypes.bfloat16 and np.isfinite(v.astype("f4")).all() for v in values)


def test_what_has_no_kernel_stays():
    program = gpu("""(float[2, 3, 4, 4] x) => (float[2, 3, 1, 1] y)
      <float[3, 1, 2, 2] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3}> {
      c = Conv<kernel_shape = [2, 2], group = 3>(x, w) m = MaxPool<kernel_shape = [2, 2]>(c)
      r = Relu(m) y = GlobalAveragePool(r) }""")
    assert apply_pass("bfloat16", program).fired == 1
    kinds = {n.op_type: n.inputs[0].dtype for n in program.main.graph if n.op_type != "Cast"}
    assert kinds.pop("Conv") == ir.DataType.BFLOAT16 and set(kinds.values()) == {ir.DataType.FLOAT}


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("ort-cpu", "has no form in bfloat16"),
        ("tvm-cpu", "has no form in bfloat16"),
        ("ort-cuda:sm_75", "sm_75 has no bfloat16, which begins with sm_80"),
    ],
)
def test_where_there_is_none(target, reason):
    program = gpu("(float[2, 2] x) => (float[2, 2] y) <float[2, 2] w = {1, 2, 3, 4}> { y = MatMul(x, w) }", target)
    result = Bfloat16().apply(program, PassContext(program.target))
    assert not result.modified and reason in result.declined[0].reason
    assert "Cast" not in canonical_text(program)


def test_targets():
    names = [p.name for p in resolve_pipeline(None, Target.parse("ort-cuda:dtype=bfloat16"))]
    assert names.count("bfloat16") == 1 and "float16" not in names
    assert names.index("fuse-attention") < names.index("bfloat16") < names.index("lower-cuda-attention")
    target = Target.parse("ort-cuda:dtype=bfloat16")
    with pytest.raises(UnsupportedError, match="a GPU is sm_75, which has no bfloat16, sm_80 is the first"):
        ort_cuda.require(target, MACHINE)
    ort_cuda.require(target, replace(MACHINE, gpus=(Gpu("B", 80, 4 << 30),)))
    with pytest.raises(InputError, match="sm_75 has no bfloat16"):
        planish.optimize("model.onnx", "ort-cuda:sm_75,dtype=bfloat16", budget=planish.Budget(gates=False))
