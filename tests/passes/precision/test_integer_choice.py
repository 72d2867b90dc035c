from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference.ops.op_conv import Conv

from planish.ir.errors import InputError
from planish.ir.program import Program
from planish.passes.base import PassContext
from planish.passes.precision.integer_choice import _patches
from planish.passes.precision.quantize import Quantize
from planish.passes.precision.quantize_weights import QuantizeWeights
from planish.passes.testing import apply_pass, program_of
from planish.runtime.ort import compile_ort

K, ZERO = 96, 3


def branches(*outliers: bool) -> Program:
    """A sum of products of x; where an outlier says so, the weights of an input that is always zero set all scales."""
    rng = np.random.default_rng(1)
    weights = [ir.tensor(rng.standard_normal((K, K)).astype("f4") / K**0.5, name=f"w{i}") for i in range(len(outliers))]
    for weight, bad in zip(weights, outliers, strict=True):
        weight.numpy()[ZERO] *= 200 if bad else 1
    body = " ".join(f"p{i} = MatMul(x, w{i})" for i in range(len(outliers)))
    text = f"""<ir_version: 10, opset_import: ["" : 23]> g (float[B, {K}] x) => (float[B, {K}] y)
      {{ {body} y = Sum({", ".join(f"p{i}" for i in range(len(outliers)))}) }}"""
    program = program_of(ir.from_onnx_text(text, initializers=weights))
    apply_pass("infer-shapes", program)
    return program


def context(program: Program) -> PassContext:
    x = np.random.default_rng(0).standard_normal((64, K)).astype("f4")
    x[:, ZERO] = 0
    return PassContext(
        program.target, run=lambda trial, entry: [compile_ort(trial.entry(entry), trial.target).run({"x": x})]
    )


def ops(program: Program) -> list[str]:
    return [n.op_type for n in program.entry(program.default_entry).graph if n.op_type != "Sum"]


@pytest.mark.parametrize("passed", [Quantize, QuantizeWeights])
def test_what_is_dear_stays_in_float32(passed):
    program = branches(False, True, False)
    ctx = context(program)
    options = {"block": 128} if passed is QuantizeWeights else {}
    whole = program.clone()
    apply_pass(passed(**options), whole, ctx)
    assert "MatMul" not in ops(whole)
    result = apply_pass(passed(error=0.03, **options), program, ctx)
    assert result.fired == 2 and ops(program).count("MatMul") == 1
    left = next(n for n in program.entry(program.default_entry).graph if n.op_type == "MatMul")
    assert left.inputs[1].name == "w1"
    assert result.notes[0].startswith("2 operators kept in low precision: error ")
    want, got = (ctx.run(p, p.default_entry)[0]["y"] for p in (branches(False, True, False), program))
    assert np.linalg.norm(got - want) / np.linalg.norm(want) <= 0.03


@pytest.mark.parametrize("passed", [Quantize, QuantizeWeights])
def test_a_budget_that_nothing_meets_changes_nothing(passed):
    program = branches(True)
    result = apply_pass(passed(error=1e-6), program, context(program))
    assert not result.modified and ops(program) == ["MatMul"]
    assert "no choice meets an error of 1.00e-06; the closest is " in result.notes[-1]


def test_a_budget_that_all_meet():
    program = branches(False, False)
    result = apply_pass(Quantize(mode="static", error=0.1), program, context(program))
    assert result.fired == 2 and result.notes[0].startswith("2 operators kept")


@pytest.mark.parametrize("passed", [Quantize, QuantizeWeights])
def test_error_is_a_share(passed):
    with pytest.raises(InputError, match="error is 2; it is a relative error between 0 and 1"):
        passed(error=2)


@pytest.mark.parametrize(
    ("shape", "weight", "settings"),
    [((2, 3, 9, 8), (5, 3, 3, 3), {}), ((1, 4, 9, 8), (6, 2, 3, 2), {"group": 2, "strides": [2, 1]}),
     ((1, 2, 9, 9), (4, 2, 2, 3), {"dilations": [2, 3]}), ((1, 3, 20), (4, 3, 5), {"strides": [3]})],
)  # fmt: skip
def test_patches_are_what_a_convolution_multiplies(shape, weight, settings):
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal(shape).astype("f4"), rng.standard_normal(weight).astype("f4")
    node = ir.node("Conv", [ir.Value(name="x"), ir.Value(name="w")], settings)
    rows, matrix, gain = _patches(node, x, w)
    want = Conv.eval(x, w, **settings)
    per_group = weight[0] // settings.get("group", 1)
    values = np.sort((rows @ matrix.T).reshape(-1))
    assert np.allclose(values, np.sort(want[:, :per_group].reshape(-1)), atol=1e-4)
    assert gain == 2.0 * want[:, 0].size * w.size
