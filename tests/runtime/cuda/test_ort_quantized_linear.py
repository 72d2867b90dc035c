"""QuantizedLinear as custom operators of ONNX Runtime's CUDA provider: the library without a GPU, numbers with one."""

from __future__ import annotations

import ctypes

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

import planish
from planish.ir.ops import import_functions
from planish.ir.ops.quantized_linear import QUANTIZED_LINEAR, quantized_linear
from planish.ir.ops.quantized_swiglu import QUANTIZED_SWIGLU
from planish.ir.target import Target
from planish.runtime import ort_cuda
from planish.runtime.cuda import driver, ort_library, toolchain
from tests.runtime.cuda.compilers import stand_in_compiler

HALF, BYTE = ir.DataType.FLOAT16, ir.DataType.UINT8


def arrays(bits, zeros, bias, n, k, block):
    random, blocks = np.random.default_rng(n), -(-k // block)
    found = {"codes": random.integers(0, 256, (n, blocks, block * bits // 8)).astype("u1")}
    found["scales"] = random.uniform(0.01, 0.1, n * blocks).astype("f2")
    if zeros:
        found["zeros"] = random.integers(0, 256, n * -(-blocks * bits // 8)).astype("u1")
    if bias:
        found["bias"] = random.standard_normal(n).astype("f2")
    return found


def model(bits=4, zeros=False, bias=False, rows=1, n=40, k=96, block=32, dtype=HALF) -> tuple[ir.Model, dict]:
    """One node, and what it reads."""
    given = arrays(bits, zeros, bias, n, k, block)
    x = ir.Value(name="x", type=ir.TensorType(dtype), shape=ir.Shape((rows, 1, k)))
    constants = []
    for name, array in given.items():
        tensor = ir.tensor(array, name=name)
        kind = ir.TensorType(tensor.dtype if tensor.dtype == BYTE else dtype)
        constants.append(ir.Value(name=name, type=kind, shape=ir.Shape(array.shape), const_value=tensor))
    y = ir.Value(name="y", type=ir.TensorType(dtype), shape=ir.Shape((rows, 1, n)))
    name = quantized_linear(bits, zeros, bias)
    node = ir.node(name, [x, *constants], {"block_size": block}, domain="planish", name="product", outputs=[y])
    opsets = {"": 23, "planish": 1}
    made = ir.Model(ir.Graph([x], [y], nodes=[node], initializers=constants, opset_imports=opsets), ir_version=10)
    import_functions(made)
    return made, given


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    yield from stand_in_compiler(tmp_path, monkeypatch)


def has_kernel(**settings) -> bool:
    return ort_library.has_kernel(next(iter(model(**settings)[0].graph)))


def test_what_has_a_kernel():
    assert has_kernel() and has_kernel(bits=8, zeros=True, bias=True) and has_kernel(k=1000, block=128)
    assert not has_kernel(dtype=ir.DataType.FLOAT)
    assert not has_kernel(k=100) and not has_kernel(k=40, block=16)


def test_the_library(stand_in):
    library = ort_library.library_for([model()[0], model(bias=True)[0], model(bits=8, zeros=True)[0]])
    raw = library.path.read_bytes()
    # Each form once: with a bias the code is the same.
    assert raw.count(b"FATBIN ") == 4 and raw.count(b"-DFEW=1") == 2 and raw.count(b"-DBITS=4") == 2
    assert raw.count(b"-DZEROS=1") == 2
    other = ort_library.library_for([gated(4, 1, 40, 96, 32)[0]])
    assert other.path.read_bytes().count(b"-DGATED=1") == 2 and ort_library.has_kernel(
        gated(8, 9, 16, 64, 16)[0].graph[0]
    )
    assert b"QuantizedLinear4Bias" in raw and b"QuantizedLinear8Zeros" in raw
    assert hasattr(ctypes.CDLL(str(library.path)), "RegisterCustomOps")


here = ort_cuda.PROVIDER in ort.get_available_providers() and driver.available() and toolchain.nvcc() is not None
gpu = pytest.mark.skipif(not here, reason="no GPU, no nvcc, or an ONNX Runtime without CUDA")


def distance(got, want) -> float:
    return float(np.linalg.norm(got.astype(float) - want) / np.linalg.norm(want))


@gpu
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("zeros", "bias"), [(False, False), (True, True), (True, False), (False, True)])
def test_numbers_on_a_gpu(bits, zeros, bias):
    """Any number of rows, with a graph and without: more than eight go eight at a time."""
    for rows, n, k, block in ((1, 40, 96, 32), (2, 301, 1000, 128), (5, 17, 4096, 16), (19, 33, 1056, 64)):
        made, given = model(bits, zeros, bias, rows, n, k, block)
        library = ort_library.library_for([made])
        assert library is not None
        for graphs in (0, 1):
            target = Target.parse(f"ort-cuda:kernels,graphs={graphs}")
            runner = ort_cuda.compile_ort_cuda(made, target, library=library)
            for seed in range(2):
                x = np.random.default_rng(seed).standard_normal((rows, 1, k)).astype("f2")
                operator = QUANTIZED_LINEAR[quantized_linear(bits, zeros, bias)]
                (want,) = operator.reference(x, *given.values(), block_size=block)
                assert distance(runner.run({"x": x})["y"], want) < 5e-4


def gated(bits: int, rows: int, n: int, k: int, block: int) -> tuple[ir.Model, list[np.ndarray]]:
    """One node of QuantizedSwiGLU, and the weights that it reads."""
    given = [array for seed in (n, n + 1) for array in list(arrays(bits, False, False, seed, k, block).values())]
    given = [array[:n] if array.ndim == 3 else array[: n * -(-k // block)] for array in given]
    given[1], given[3] = given[1] / np.float16(8), given[3] / np.float16(8)
    x = ir.Value(name="x", type=ir.TensorType(HALF), shape=ir.Shape((rows, 1, k)))
    constants = []
    for index, array in enumerate(given):
        tensor = ir.tensor(array, name=f"w{index}")
        kind = ir.TensorType(tensor.dtype)
        constants.append(ir.Value(name=f"w{index}", type=kind, shape=ir.Shape(array.shape), const_value=tensor))
    y = ir.Value(name="y", type=ir.TensorType(HALF), shape=ir.Shape((rows, 1, n)))
    settings = {"block_size": block}
    node = ir.node(f"QuantizedSwiGLU{bits}", [x, *constants], settings, domain="planish", name="gate", outputs=[y])
    opsets = {"": 23, "planish": 1}
    made = ir.Model(ir.Graph([x], [y], nodes=[node], initializers=constants, opset_imports=opsets), ir_version=10)
    import_functions(made)
    return made, given


@gpu
@pytest.mark.parametrize("bits", [4, 8])
def test_gate_on_a_gpu(bits):
    for rows, n, k, block in ((1, 40, 96, 32), (2, 301, 1000, 128), (5, 17, 4096, 16), (19, 33, 1056, 64)):
        made, given = gated(bits, rows, n, k, block)
        runner = ort_cuda.compile_ort_cuda(
            made, Target.parse("ort-cuda:kernels"), library=ort_library.library_for([made])
        )
        x = np.random.default_rng(k).standard_normal((rows, 1, k)).astype("f2") / np.float16(4)
        (want,) = QUANTIZED_SWIGLU[f"QuantizedSwiGLU{bits}"].reference(x, *given, block_size=block)
        got = runner.run({"x": x})["y"]
        assert np.isfinite(got).all() and distance(got, want) < 5e-4


def step(bits: int, target: str) -> tuple[planish.Executable, np.ndarray, np.ndarray]:
    """A small model through `optimize`, an input, and what comes of it in float64 with weights as they were."""
    random = np.random.default_rng(0)
    weights = [
        ir.tensor(random.standard_normal(shape).astype("f4") / 16, name=name)
        for name, shape in {"w": (256, 512), "v": (512, 256), "c": (256,)}.items()
    ]
    text = (
        '<ir_version: 10, opset_import: ["" : 23]> g (float[2, 1, 256] x) => (float[2, 1, 256] y) { '
        "m = MatMul(x, w) a = Sigmoid(m) p = MatMul(a, v) s = Add(p, c) y = Add(s, x) }"
    )
    x = random.standard_normal((2, 1, 256)).astype("f4")
    exe = planish.optimize(
        ir.from_onnx_text(text, initializers=weights), target, approximate=f"quantize-weights{{bits={bits}}}",
        calibration={"x": x}, budget=planish.Budget(gates=False),
    )  # fmt: skip
    w, v, c = (t.numpy().astype("f8") for t in weights)
    return exe, x, 1 / (1 + np.exp(-(x @ w))) @ v + c + x


@pytest.mark.parametrize("bits", [4, 8])
def test_the_default_pipeline_quantizes_what_is_float16(bits, stand_in):
    exe, _, _ = step(bits, "ort-cuda:sm_121,dtype=float16,kernels")
    assert exe.report.after.ops[f"planish::QuantizedLinear{bits}"] == 2
    plain, _, _ = step(bits, "ort-cuda:sm_121,dtype=float16")
    assert plain.report.after.ops["com.microsoft::MatMulNBits"] == 2


@gpu
@pytest.mark.parametrize("target", ["ort-cuda:dtype=float16", "ort-cuda:dtype=float16,kernels"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_step_on_a_gpu(bits, target):
    exe, x, want = step(bits, target)
    assert distance(exe.run({"x": x})["y"] - x, want - x) < (0.01 if bits == 8 else 0.15)
