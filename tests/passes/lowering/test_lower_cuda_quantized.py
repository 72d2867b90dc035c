"""MatMulNBits of few rows as QuantizedLinear; numbers on ONNX Runtime's CPU, which runs both."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from planish.ir.ops import import_functions
from planish.ir.program import Program
from planish.ir.target import Target
from planish.passes.defaults import lowering
from planish.passes.testing import apply_pass, check_declines, check_numerics, program_of

PASS = "lower-cuda-quantized"
TARGET = "ort-cuda:dtype=float16,kernels"


def model(shape="2, 1", bits=4, zeros=False, bias=False, block=32, n=12, k=96, kind="float16", order=False) -> ir.Model:
    random, blocks = np.random.default_rng(0), -(-k // block)
    arrays = {
        "c": random.integers(0, 256, (n, blocks, block * bits // 8)).astype("u1"),
        "s": random.uniform(0.01, 0.1, n * blocks).astype("f2" if kind == "float16" else "f4"),
        "z": random.integers(0, 256, n * -(-blocks * bits // 8)).astype("u1") if zeros else None,
        "o": np.zeros(k, "i4") if order else None,
        "b": random.standard_normal(n).astype("f2" if kind == "float16" else "f4") if bias else None,
    }
    inputs = ", ".join("" if array is None else name for name, array in arrays.items()).rstrip(", ")
    text = f"""<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>
    g ({kind}[{shape}, {k}] x) => ({kind}[{shape}, {n}] y) {{
      [product] y = com.microsoft.MatMulNBits <K={k}, N={n}, bits={bits}, block_size={block}> (x, {inputs})
    }}"""
    given = [ir.tensor(array, name=name) for name, array in arrays.items() if array is not None]
    return ir.from_onnx_text(text, initializers=given)


def lowered(given: ir.Model, target: str = TARGET) -> Program:
    program = program_of(given, target)
    apply_pass(PASS, program)
    return program


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("zeros", "bias"), [(False, False), (True, False), (False, True), (True, True)])
def test_few_rows(bits, zeros, bias):
    given = model(bits=bits, zeros=zeros, bias=bias)
    (node,) = lowered(given).main.graph
    assert node.op_type == f"QuantizedLinear{bits}{'Zeros' * zeros}{'Bias' * bias}"
    assert node.attributes.get_int("block_size") == 32
    x = np.random.default_rng(1).standard_normal((2, 1, 96)).astype("f2")
    check_numerics(PASS, program_of(given, TARGET), {"x": x})


@pytest.mark.parametrize("shape", ["8", "1", "4, 2", "B, 1", "1, 8"])
def test_shapes_of_few_rows(shape):
    assert [node.op_type for node in lowered(model(shape)).main.graph] == ["QuantizedLinear4"]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"shape": "3, 6"}, "it has 18 rows, and the kernel pays for 16 at most"),
        ({"shape": "B, S"}, "known only when the model runs"),
        ({"shape": "1, S"}, "known only when the model runs"),
        ({"shape": "R"}, "known only when the model runs"),
        ({"kind": "float"}, "it is not in float16"),
        ({"order": True}, "g_idx"),
        ({"k": 40, "block": 16, "bits": 4}, "40 columns in blocks of 16: kernels read 16 bytes at a time"),
        ({"k": 100, "block": 32}, "100 columns in blocks of 32"),
    ],
)  # fmt: skip
def test_what_is_left(settings, reason):
    check_declines(PASS, program_of(model(**settings), TARGET), reason)


def gated(bits=4, blocks=(32, 32), used="") -> ir.Model:
    """The gate of a feed-forward block, and what it is behind."""
    random, weights, nodes = np.random.default_rng(0), [], []
    for name, block in zip("gu", blocks, strict=True):
        arrays = {
            "c": random.integers(0, 256, (24, 96 // block, block * bits // 8)).astype("u1"),
            "s": random.uniform(0.001, 0.003, 24 * 96 // block).astype("f2"),
        }
        weights += [ir.tensor(array, name=name + kind) for kind, array in arrays.items()]
        settings = f"K=96, N=24, bits={bits}, block_size={block}"
        nodes.append(f"[{name}n] {name} = com.microsoft.MatMulNBits <{settings}> (x, {name}c, {name}s)")
    text = f"""<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1, "planish" : 1]>
    g (float16[2, 1, 96] x) => (float16[2, 1, 24] y{", float16[2, 1, 24] z" * bool(used)}) {{
      {" ".join(nodes)} [s] y = planish.SwiGLU(g, u) {used} }}"""
    made = ir.from_onnx_text(text, initializers=weights)
    import_functions(made)
    return made


@pytest.mark.parametrize("bits", [4, 8])
def test_gate(bits):
    (node,) = lowered(gated(bits)).main.graph
    assert node.op_type == f"QuantizedSwiGLU{bits}" and node.attributes.get_int("block_size") == 32
    assert [value.name for value in node.inputs] == ["x", "gc", "gs", "uc", "us"]
    x = np.random.default_rng(1).standard_normal((2, 1, 96)).astype("f2")
    check_numerics(PASS, program_of(gated(bits), TARGET), {"x": x})


@pytest.mark.parametrize("settings", [{"blocks": (32, 16)}, {"used": "z = Identity(g)"}])
def test_gates_that_stay(settings):
    ops = [node.op_type for node in lowered(gated(**settings)).main.graph]
    assert ops[:3] == ["QuantizedLinear4", "QuantizedLinear4", "SwiGLU"]


def test_only_where_there_are_kernels():
    check_declines(PASS, program_of(model(), "ort-cuda:dtype=float16"), "'ort-cuda:kernels' has")
    assert PASS in lowering(TARGET) and PASS not in lowering("ort-cuda") and PASS not in lowering("ort-cpu:kernels")


def test_entries_share_their_weights():
    """A prompt keeps MatMulNBits, a step does not, and both read what is stored once."""
    prompt, step = model("1, S"), model("1, 1")
    for name, value in step.graph.initializers.items():
        value.const_value = prompt.graph.initializers[name].const_value
    program = Program({"prefill": prompt, "decode": step}, Target.parse(TARGET))
    apply_pass(PASS, program)
    assert [node.op_type for node in program.nodes()] == ["MatMulNBits", "QuantizedLinear4"]
    tensors = [[v.const_value for v in m.graph.initializers.values()] for m in program.entries.values()]
    assert len(tensors[0]) == 2 and all(a is b for a, b in zip(*tensors, strict=True))
