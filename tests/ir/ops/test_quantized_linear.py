"""planish::QuantizedLinear4 and relatives: bodies and com.microsoft's MatMulNBits against the definition."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from planish.ir.infer import infer_shapes
from planish.ir.ops import DIALECT, InferenceError, TensorInfo, import_functions
from planish.ir.ops.quantized_linear import QUANTIZED_LINEAR, quantized_linear
from planish.ir.ops.quantized_swiglu import QUANTIZED_SWIGLU
from planish.ir.printer import parse_model
from planish.ir.verify import verify_model


def arrays(bits, zeros, bias, n, k, block, seed=0):
    random, blocks = np.random.default_rng(seed), -(-k // block)
    found = {"c": random.integers(0, 256, (n, blocks, block * bits // 8)).astype("u1")}
    found["s"] = random.uniform(0.01, 0.1, (n, blocks)).astype("f4")
    if zeros:
        found["z"] = random.integers(0, 256, (n, -(-blocks * bits // 8))).astype("u1")
    if bias:
        found["b"] = random.standard_normal(n).astype("f4")
    return found


def model_of(bits, zeros, bias, given, k, block, microsoft=False):
    """One node: the dialect's operator, or MatMulNBits with the same inputs."""
    n = len(given["c"])
    ours = f"[p] y = planish.{quantized_linear(bits, zeros, bias)} <block_size={block}> ({', '.join(['x', *given])})"
    names = [name if name in given else "" for name in "cszgb"]
    theirs = (
        f"[p] y = com.microsoft.MatMulNBits <K={k}, N={n}, bits={bits}, block_size={block}> "
        f"({', '.join(['x', *names]).rstrip(', ')})"
    )
    kinds = {"f": "float", "u": "uint8"}
    inputs = [f"{kinds[a.dtype.kind]}[{', '.join(map(str, a.shape))}] {name}" for name, a in given.items()]
    text = f"""<ir_version: 10, opset_import: ["" : 23, "planish" : 1, "com.microsoft" : 1]>
    g (float[A, B, {k}] x, {", ".join(inputs)}) => (float[A, B, {n}] y) {{ {theirs if microsoft else ours} }}"""
    return parse_model(text)


def run(model, feeds):
    import_functions(model)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def distance(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("n", "k", "block"), [(5, 40, 32), (16, 128, 16), (3, 24, 128), (9, 96, 32)])
def test_body_and_matmulnbits_are_the_definition(bits, zeros, bias, n, k, block) -> None:
    given = arrays(bits, zeros, bias, n, k, block, seed=n)
    x = np.random.default_rng(k).standard_normal((2, 3, k)).astype("f4")
    (want,) = QUANTIZED_LINEAR[quantized_linear(bits, zeros, bias)].reference(x, *given.values(), block_size=block)
    model = model_of(bits, zeros, bias, given, k, block)
    infer_shapes(model)
    verify_model(model, full=True)
    got = run(model, {"x": x} | given)
    assert got.shape == want.shape and distance(got, want) < 1e-6
    theirs = run(model_of(bits, zeros, bias, given, k, block, microsoft=True), {"x": x} | given)
    assert distance(theirs, want) < 1e-5


def test_flat_scales_and_one_row() -> None:
    given = arrays(4, False, False, 7, 64, 16)
    given["s"] = given["s"].reshape(-1)
    x = np.random.default_rng(1).standard_normal((1, 1, 64)).astype("f4")
    (want,) = QUANTIZED_LINEAR["QuantizedLinear4"].reference(x, *given.values(), block_size=16)
    assert distance(run(model_of(4, False, False, given, 64, 16), {"x": x} | given), want) < 1e-6


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "k", "block"), [(5, 40, 32), (9, 96, 16)])
def test_gated_unit(bits, n, k, block) -> None:
    gate, up = (arrays(bits, False, False, n, k, block, seed) for seed in range(2))
    x = np.random.default_rng(k).standard_normal((2, 3, k)).astype("f4")
    weights = {f"{name}{kind}": array for name, part in (("g", gate), ("u", up)) for kind, array in part.items()}
    op = QUANTIZED_SWIGLU[f"QuantizedSwiGLU{bits}"]
    (want,) = op.reference(x, *weights.values(), block_size=block)
    linear = QUANTIZED_LINEAR[quantized_linear(bits, False, False)]
    (a,), (b,) = (linear.reference(x, *part.values(), block_size=block) for part in (gate, up))
    np.testing.assert_allclose(want, a / (1 + np.exp(-a)) * b, rtol=1e-9, atol=1e-12)
    inputs = [f"{'float' if a.dtype.kind == 'f' else 'uint8'}[{', '.join(map(str, a.shape))}] {name}"
              for name, a in weights.items()]  # fmt: skip
    model = parse_model(f"""<ir_version: 10, opset_import: ["" : 23, "planish" : 1]>
    g (float[A, B, {k}] x, {", ".join(inputs)}) => (float[A, B, {n}] y)
    {{ [p] y = planish.QuantizedSwiGLU{bits} <block_size={block}> (x, {", ".join(weights)}) }}""")
    infer_shapes(model)
    verify_model(model, full=True)
    got = run(model, {"x": x} | weights)
    assert got.shape == want.shape and distance(got, want) < 1e-6
    known = [TensorInfo(ir.DataType.FLOAT, ("a", k))] + [TensorInfo(None, a.shape) for a in weights.values()]
    assert op.infer(known, {"block_size": block})[0].dims == ("a", n)
    with pytest.raises(InferenceError, match="rows of the two weights"):
        op.infer([*known[:3], TensorInfo(None, (n + 1, *gate["c"].shape[1:])), None], {"block_size": block})


def test_inference() -> None:
    op = DIALECT["QuantizedLinear4Bias"]
    half, byte = ir.DataType.FLOAT16, ir.DataType.UINT8
    inputs = [
        TensorInfo(half, ("b", 1, 100)), TensorInfo(byte, (12, 4, 16)), TensorInfo(half, (48,)), TensorInfo(half, (12,))
    ]  # fmt: skip
    assert list(op.infer(inputs, {"block_size": 32})) == [TensorInfo(half, ("b", 1, 12))]
    with pytest.raises(InferenceError, match="x has 100 columns and codes 4 blocks of 16"):
        op.infer([inputs[0], TensorInfo(byte, (12, 4, 8)), *inputs[2:]], {"block_size": 16})
    with pytest.raises(InferenceError, match="bytes of a block: sizes 16 and 8 must be equal"):
        op.infer(inputs, {"block_size": 16})
    assert op.flops([TensorInfo(half, (2, 1, 100))], [TensorInfo(half, (2, 1, 12))], {}) == 2 * 24 * 100
