"""Residual and normalization, bias and activation, as one operator of ONNX Runtime; numbers on its CPU kernels."""

from __future__ import annotations

import numpy as np
import pytest

from planish.passes.testing import check_declines, check_numerics, check_rewrite, check_untouched, program_of

NORM, GELU = "lower-cuda-normalization", "lower-cuda-activation"
ONE = "{1, 2, 1, 0.5}"
HEAD = '<ir_version: 10, opset_import: ["" : 23{more}]> g (float[2, 3, 4] x, float[2, 3, 4] r) => ({out}) '
WEIGHTS = f"<float[4] s = {ONE}, float[4] b = {{0, 1, 0, 2}}, float[4] c = {{3, 0, 1, 0}}"
MATRIX = ", float[4, 4] w = {1,0,0,2, 0,1,0,0, 3,0,1,0, 0,0,4,1}"
Y, Z = "float[2, 3, 4] y", "float[2, 3, 4] y, float[2, 3, 4] z"
INPUTS = {n: np.random.default_rng(i).standard_normal((2, 3, 4)).astype("f4") for i, n in enumerate("xr")}


def gpu(text: str, more: str = "", out: str = Y):
    return program_of(HEAD.replace("{more}", more).replace("{out}", out) + text, "ort-cuda")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("rms", [False, True])
def test_residual(bias, used, rms):
    weights = (
        (WEIGHTS if not (rms and bias) else WEIGHTS.replace("float[4] b = {0, 1, 0, 2}, ", "")) + MATRIX * bias + ">"
    )
    weights = weights if bias else weights.replace(", float[4] c = {3, 0, 1, 0}", "")
    weights = weights.replace(", float[4] b = {0, 1, 0, 2}", "") if rms else weights
    product = "p = MatMul(x, w) h = Add(p, c)" if bias else "h = Identity(x)"
    norm = "RMSNormalization<axis = -1, epsilon = 1e-6>(t, s)" if rms else "LayerNormalization<axis = -1>(t, s, b)"
    text = f"{weights} {{ {product} t = Add(h, r) y = {norm} {'z = Exp(t)' if used else ''} }}"
    before = gpu(text, out=Z if used else Y)
    op = "SkipSimplifiedLayerNormalization" if rms else "SkipLayerNormalization"
    operands = [*(["p"] if bias else ["h"]), "r", "s", *([] if rms else ["b"]), *(["c"] if bias else [])]
    outputs = "y, , , t" if used else "y"
    product = "p = MatMul(x, w)" if bias else product
    epsilon = "1e-6" if rms else "1e-5"
    after = f"{weights} {{ {product} {outputs} = com.microsoft.{op}<epsilon = {epsilon}>({', '.join(operands)}) "
    after += f"{'z = Exp(t)' if used else ''} }}"
    check_rewrite(NORM, before, gpu(after, ', "com.microsoft" : 1', Z if used else Y), edits=1)
    check_numerics(NORM, before, INPUTS)


@pytest.mark.parametrize(("attribute", "op"), [("", "BiasGelu"), ('<approximate = "tanh">', "FastGelu")])
def test_gelu(attribute, op):
    weights = "<float[4] c = {3, 0, 1, 0}>"
    before = gpu(f"{weights} {{ h = Add(x, c) g = Gelu{attribute}(h) y = Add(g, r) }}")
    after = gpu(f"{weights} {{ g = com.microsoft.{op}(x, c) y = Add(g, r) }}", ', "com.microsoft" : 1')
    check_rewrite(GELU, before, after, edits=1)
    check_numerics(GELU, before, INPUTS)


def test_what_is_left():
    weights = WEIGHTS.replace(", float[4] c = {3, 0, 1, 0}", "")
    plain = f"{weights}> {{ t = Add(x, r) y = LayerNormalization<axis = -1>(t, s, b) }}"
    header = HEAD.replace("{more}", "").replace("{out}", Y)
    check_declines(NORM, program_of(header + plain, "ort-cpu"), "'ort-cuda' has")
    wide = (header + plain).replace("float[2, 3, 4] r", "float[1, 3, 4] r")
    check_declines(NORM, program_of(wide, "ort-cuda"), "not proved to have one shape")
    double = (header + plain).replace("float", "double")
    check_declines(NORM, program_of(double, "ort-cuda"), "neither float32 nor float16")
    check_untouched(GELU, gpu("{ h = Add(x, r) y = Gelu(h) }"))
    first = (
        plain.replace("axis = -1", "axis = 1")
        .replace("float[4]", "float[3, 4]")
        .replace(ONE, "{1,1,1,1,1,1,1,1,1,1,1,1}")
    )
    first = first.replace("{0, 1, 0, 2}", "{1,1,1,1,1,1,1,1,1,1,1,1}")
    check_declines(NORM, gpu(first), "not over the last one")
