"""Every operator of target tvm-cpu against ONNX Runtime, at sizes that are known only when it runs."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from planish.ir.errors import UnsupportedError
from planish.ir.infer import infer_shapes
from planish.ir.target import Target
from planish.runtime.ort import compile_ort
from planish.runtime.tvm import compile_tvm
from tests.runtime.models import model

pytest.importorskip("tvm")
TARGET = Target.parse("tvm-cpu:threads=1")
RNG = np.random.default_rng(0)


def weight(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def compare(text: str, weights: dict[str, np.ndarray], *feeds: dict[str, np.ndarray], tolerance: float = 3e-6) -> None:
    """The model of a body on both runtimes, compiled once for all feeds."""
    made = model(f'<ir_version: 10, opset_import: ["" : 20]>\n{text}', weights)
    infer_shapes(made)
    want, got = compile_ort(made, Target.parse("ort-cpu:threads=1"), optimize=False), compile_tvm(made, TARGET)
    for feed in feeds:
        results = got.run(feed)
        for name, expected in want.run(feed).items():
            found = results[name]
            assert found.dtype == expected.dtype and found.shape == expected.shape, (name, found.shape, expected.shape)
            if expected.dtype.kind == "f":
                scale = max(float(np.abs(expected[np.isfinite(expected)]).max(initial=0.0)), 1.0)
                np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * scale, err_msg=name)
            else:
                np.testing.assert_array_equal(found, expected, name)


def pairs(*shapes: tuple[tuple[int, ...], ...]) -> list[dict[str, np.ndarray]]:
    """Feeds a, b, c ... of these shapes."""
    return [{chr(97 + i): weight(*shape) for i, shape in enumerate(given)} for given in shapes]


def test_elementwise_and_broadcasting() -> None:
    text = """g (float[n, s, 5] a, float[s, 5] b, float[n, s, 1] c) =>
      (float[n, s, 5] o1, float[n, s, 5] o2, bool[n, s, 5] o3, float[n, s, 5] o4, float[n, s, 5] o5) {
      sum = Add(a, b)
      o1 = Mul(sum, c)
      d = Div(a, two)
      e = Sub(d, vector)
      o2 = Max(e, b)
      g1 = Greater(a, b)
      g2 = LessOrEqual(c, a)
      o3 = And(g1, g2)
      r = Relu(a)
      sq = Sqrt(r)
      p = Pow(sq, two)
      o4 = Where(o3, p, b)
      n1 = Neg(a)
      ab = Abs(n1)
      f = Floor(ab)
      o5 = Min(f, two, ab)
    }"""
    weights = {"two": np.array(2, np.float32), "vector": weight(5)}
    compare(text, weights, *pairs(((1, 1, 5), (1, 5), (1, 1, 1)), ((3, 4, 5), (4, 5), (3, 4, 1))))


def test_activations() -> None:
    names = ("Erf", "Exp", "Sigmoid", "Tanh", "Gelu", "LeakyRelu", "Sin", "Cos", "Reciprocal", "HardSigmoid")
    outputs = ", ".join(f"float[n, m] o{i}" for i in range(len(names)))
    body = "\n".join(f"o{i} = {name}(a)" for i, name in enumerate(names))
    feeds = pairs(((2, 33),), ((1, 64),))
    for feed in feeds:
        feed["a"] *= 6
        feed["a"][np.abs(feed["a"]) < 0.01] = 1
    compare(f"g (float[n, m] a) => ({outputs}) {{ {body} }}", {}, *feeds, tolerance=1e-5)


def test_views_of_symbolic_shapes() -> None:
    text = """g (float[n, s, 12] a) => (float[n, h, s, d] o1, float[m, k] o2, float[n, s, 4] o3, float[n, t, 12] o4) {
      shape = Shape (a)
      first = Gather <axis = 0> (shape, zero)
      length = Gather <axis = 0> (shape, one)
      fu = Unsqueeze(first, axis0)
      lu = Unsqueeze(length, axis0)
      heads = Concat <axis = 0> (fu, lu, four, minus)
      split = Reshape(a, heads)
      o1 = Transpose <perm = [0, 2, 1, 3]> (split)
      o2 = Reshape(a, flat)
      x, y, z = Split <axis = 2> (a, parts)
      o3 = Add(x, z)
      cut = Slice(a, axis0, last, axis1)
      o4 = Concat <axis = 1> (a, cut)
    }"""
    weights = {
        "zero": np.array(0), "one": np.array(1), "axis0": np.array([0]), "axis1": np.array([1]),
        "four": np.array([4]), "minus": np.array([-1]), "flat": np.array([-1, 12]), "parts": np.array([4, 4, 4]),
        "last": np.array([2]),
    }  # fmt: skip
    compare(text, weights, *pairs(((1, 1, 12),), ((3, 5, 12),)))


def test_products() -> None:
    text = """g (float[n, s, 20] a, float[n, 20, m] b, float[n, s, 7] c) =>
      (float[n, s, m] o1, float[n, s, 7] o2, float[k, 7] o3, float[n, s, 3] o4, float[s, 7] o5) {
      o1 = MatMul(a, b)
      p = MatMul(a, w)
      o2 = Add(p, c)
      flat = Reshape(a, shape)
      o3 = Gemm <transB = 1> (flat, wt, bias)
      o4 = MatMul(c, v)
      row = Gather <axis = 0> (c, zero)
      o5 = Gemm <alpha = 0.5, beta = 2.0> (row, square, bias)
    }"""
    weights = {
        "w": weight(20, 7), "wt": weight(7, 20), "bias": weight(7), "v": weight(1, 7, 3), "square": weight(7, 7),
        "shape": np.array([-1, 20]), "zero": np.array(0),
    }  # fmt: skip
    compare(text, weights, *pairs(((1, 1, 20), (1, 20, 1), (1, 1, 7)), ((2, 13, 20), (2, 20, 33), (2, 13, 7))))


def test_reductions_softmax_and_norms() -> None:
    text = """g (float[n, s, 24] a) => (float[n, 1, 24] o1, float[n, s] o2, float[s] o3, float[n, s, 24] o4,
      float[n, s, 24] o5, float[n, s, 24] o6, float[n, s, 1] o7) {
      o1 = ReduceMean <keepdims = 1> (a, middle)
      o2 = ReduceMax <keepdims = 0> (a, last)
      o3 = ReduceSum <keepdims = 0> (a, outer)
      o4 = Softmax <axis = -1> (a)
      o5 = Softmax <axis = 1> (a)
      o6 = LayerNormalization <axis = -1, epsilon = 0.001> (a, scale, bias)
      o7 = ReduceL2 <keepdims = 1> (a, last)
    }"""
    weights = {
        "middle": np.array([1]), "last": np.array([2]), "outer": np.array([0, 2]),
        "scale": weight(24), "bias": weight(24),
    }  # fmt: skip
    compare(text, weights, *pairs(((1, 1, 24),), ((3, 5, 24),)), tolerance=1e-5)


def test_images_with_their_channels_last_and_first() -> None:
    text = """g (float[n, 3, 12, 11] a) => (float[n, 8, 6, 6] o1, float[n, 8] o2, float[n, 36, 8] o3) {
      c = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (a, w1, b1)
      r = Relu(c)
      d = Conv <group = 8, pads = [1, 1, 1, 1]> (r, w2)
      g2 = Conv <group = 2> (d, w3, b1)
      o1 = Add(g2, r)
      p = MaxPool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (o1)
      q = AveragePool <kernel_shape = [2, 2]> (p)
      m = GlobalAveragePool(q)
      o2 = Reshape(m, flat)
      t = Reshape(o1, pixels)
      o3 = Transpose <perm = [0, 2, 1]> (t)
    }"""
    weights = {
        "w1": weight(8, 3, 3, 3), "b1": weight(8), "w2": weight(8, 1, 3, 3), "w3": weight(8, 4, 1, 1),
        "flat": np.array([-1, 8]), "pixels": np.array([0, 8, 36]),
    }  # fmt: skip
    compare(text, weights, *pairs(((1, 3, 12, 11),), ((3, 3, 12, 11),)), tolerance=1e-5)


def test_signals_of_one_axis() -> None:
    text = """g (float[n, 4, length] a) => (float[n, 6, out] o) {
      o = Conv <kernel_shape = [3], strides = [2], pads = [1, 1]> (a, w, b)
    }"""
    compare(text, {"w": weight(6, 4, 3), "b": weight(6)}, *pairs(((1, 4, 9),), ((2, 4, 32),)), tolerance=1e-5)


def test_gathers() -> None:
    text = """g (float[n, 6] a, int64[k] i, bool[n, 6] mask, int64[n, 6, 2] at) =>
      (float[k, 6] o1, bool[n, 6] o2, float[n] o3, float[n, 6] o4, int64[r] o5) {
      o1 = Gather <axis = 0> (a, i)
      o2 = GatherND(mask, at)
      o3 = Gather <axis = 1> (a, minus)
      o4 = Gather <axis = 1> (a, order)
      size = Shape <start = 0, end = 1> (a)
      count = Squeeze(size)
      o5 = Range(zero, count, one)
    }"""
    weights = {"minus": np.array(-1), "order": np.array([5, -6, 1, 1, 2, 0]), "zero": np.array(0), "one": np.array(1)}
    feeds = []
    for n, k in ((1, 1), (4, 9)):
        at = np.stack([RNG.integers(0, n, (n, 6)), RNG.integers(0, 6, (n, 6))], -1)
        feeds.append({"a": weight(n, 6), "i": RNG.integers(-n, n, k), "mask": RNG.random((n, 6)) > 0.5, "at": at})
    compare(text, weights, *feeds)


@pytest.mark.parametrize("causal", (0, 1))
def test_attention_with_masks_and_grouped_heads(causal: int) -> None:
    text = f"""g (float[n, s, 32] q, float[n, s, 16] k, float[n, s, 16] v, bool[n, 1, s, s] m) => (float[n, s, 32] o) {{
      o = Attention <q_num_heads = 4, kv_num_heads = 2, is_causal = {causal}> (q, k, v, m)
    }}"""
    made = model(f'<ir_version: 11, opset_import: ["" : 23]>\n{text}')
    want, got = compile_ort(made, Target.parse("ort-cpu:threads=1")), compile_tvm(made, TARGET)
    for n, s in ((1, 1), (2, 17)):
        mask = RNG.random((n, 1, s, s)) > 0.4
        mask[..., 0] = True
        feed = {"q": weight(n, s, 32), "k": weight(n, s, 16), "v": weight(n, s, 16), "m": mask}
        np.testing.assert_allclose(got.run(feed)["o"], want.run(feed)["o"], rtol=1e-5, atol=2e-6)


def test_outputs_that_are_inputs_or_weights_are_copies() -> None:
    text = """g (float[n, 4] a) => (float[n, 4] o1, float[2, 2] o2) {
      o1 = Identity(a)
      o2 = Identity(w)
    }"""
    made = model(f'<ir_version: 10, opset_import: ["" : 20]>\n{text}', {"w": weight(2, 2)})
    runner = compile_tvm(made, TARGET)
    a = weight(3, 4)
    first = runner.run({"a": a})
    first["o1"][...] = 7
    first["o2"][...] = 7
    again = runner.run({"a": a})
    assert not (a == 7).any() and not (again["o1"] == 7).any() and not (again["o2"] == 7).any()


@pytest.mark.parametrize(
    ("text", "message"),
    (
        ("g (float[n] a) => (float[n] o) { o = CumSum(a, axis) }", "does not take CumSum .*no code"),
        ("g (float16[n] a) => (float16[n] o) { o = Exp(a) }", "Exp .*float16; it takes float32"),
        (
            "g (float[n, 4] a, int64[2] s) => (float[x, y] o) { o = Reshape(a, s) }",
            "Reshape .*not known from the sizes",
        ),
    ),
)
def test_what_has_no_code_is_named(text: str, message: str) -> None:
    made = model(f'<ir_version: 10, opset_import: ["" : 20]>\n{text}', {"axis": np.array(0)} if "axis" in text else {})
    with pytest.raises(UnsupportedError, match=message):
        compile_tvm(made, TARGET)


def test_weights_of_a_name_are_shared() -> None:
    text = "g (float[n, 16] a) => (float[n, 16] o) { x = MatMul(a, w) o = MatMul(x, w) }"
    made = model(f'<ir_version: 10, opset_import: ["" : 20]>\n{text}', {"w": weight(16, 16)})
    assert isinstance(made, ir.Model)
    assert len([name for name in compile_tvm(made, TARGET).weights if name.startswith("w.panels")]) == 1
