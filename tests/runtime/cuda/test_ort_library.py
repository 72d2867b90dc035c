"""The library of CUDA kernels for ONNX Runtime: made without a GPU, and run where there is one."""

from __future__ import annotations

import ctypes
import subprocess

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

import planish
from planish.ir.ops import dialect_op, import_functions
from planish.ir.target import Target
from planish.passes.testing import program_of
from planish.runtime import ort_cuda
from planish.runtime.artifact import read_manifest
from planish.runtime.cuda import driver, ort_library, toolchain
from tests.runtime.cuda.compilers import stand_in_compiler

HALF = ir.DataType.FLOAT16


def attention(heads=2, size=64, length=70, block=64, lists=True, dtype=HALF, causal=1) -> ir.Model:
    """A model of one node."""
    shape = (2, length, heads * size)
    inputs = [ir.Value(name=n, type=ir.TensorType(dtype), shape=ir.Shape(shape)) for n in "qkv"]
    tables = []
    rows = -(-length // block)
    if lists:
        indptr = np.array([[0, *np.cumsum(range(1, rows + 1))]], np.int32)
        indices = np.concatenate([np.arange(n) for n in range(1, rows + 1)]).astype(np.int32)
        for name, array in (("indptr", indptr), ("indices", indices), ("layout", np.zeros(heads, np.int32))):
            tensor = ir.tensor(array, name=name)
            kind = ir.TensorType(ir.DataType.INT32)
            tables.append(ir.Value(name=name, type=kind, shape=ir.Shape(array.shape), const_value=tensor))
    attributes = {"q_num_heads": heads, "kv_num_heads": heads, "scale": 0.125, "is_causal": causal}
    if lists:
        attributes["block_size"] = block
    y = ir.Value(name="y", type=ir.TensorType(dtype), shape=ir.Shape(shape))
    op = "BlockSparseAttention" if lists else "FlashAttention"
    node = ir.node(op, [*inputs, *tables], attributes, domain="planish", name="attend", outputs=[y])
    opsets = {"": 23, "planish": 1}
    model = ir.Model(ir.Graph(inputs, [y], nodes=[node], initializers=tables, opset_imports=opsets), ir_version=10)
    import_functions(model)
    return model


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    yield from stand_in_compiler(tmp_path, monkeypatch)


def nodes(model: ir.Model) -> bool:
    return ort_library.has_kernel(next(iter(model.graph)))


def test_what_has_a_kernel():
    assert nodes(attention()) and nodes(attention(lists=False)) and nodes(attention(size=128, block=128))
    assert (
        not nodes(attention(size=32))
        and not nodes(attention(block=32))
        and not nodes(attention(dtype=ir.DataType.FLOAT))
    )
    text = """<ir_version: 10, opset_import: ["" : 23, "planish" : 1]> g (float16[2] a, float16[2] b) => (float16[2] y)
    { y = planish.SwiGLU(a, b) }"""
    assert nodes(program_of(text).main) and not nodes(program_of(text.replace("float16", "float")).main)
    assert ort_library.library_for([attention(size=32)]) is None


def test_the_library(stand_in):
    library = ort_library.library_for([attention(), attention(size=128, lists=False)])
    assert library is ort_library.library_for([attention(size=128, lists=False), attention()])
    assert library.code == ("sm_75", "sm_80", "sm_90a", "compute_80") and library.cuda == (13, 0)
    raw = library.path.read_bytes()
    assert raw.count(b"FATBIN ") == 8 and raw.count(b"-DHEAD=128 ") == 4 and raw.count(b"code=sm_75") == 8
    assert b"CUDAExecutionProvider" in raw
    needed = subprocess.run(["readelf", "-d", library.path], capture_output=True, text=True).stdout
    assert "libcuda" not in needed  # it is looked for when a kernel runs
    assert hasattr(ctypes.CDLL(str(library.path)), "RegisterCustomOps")


def test_an_operator_fits_all_of_its_nodes(stand_in):
    assert ort_library.library_for([attention(), attention(size=32)]) is None
    library = ort_library.library_for([attention(), attention(lists=False), attention(size=32)])
    raw = library.path.read_bytes()
    assert b"FlashAttention" in raw and b"-DHEAD=64" in raw and b"planish_cuda" not in raw


def test_an_artifact_for_another_machine(stand_in, tmp_path):
    exe = planish.optimize(
        attention(), "ort-cuda:sm_121,kernels", passes="eliminate-dead-code", budget=planish.Budget(gates=False)
    )
    manifest = read_manifest(exe.export(tmp_path / "a"))
    assert manifest.native == ["kernels/kernels.so"] and manifest.needs["cuda"] == [13, 0]
    assert manifest.needs["code"] == ["sm_75", "sm_80", "sm_90a", "compute_80"]
    assert ort_cuda.kernels_of(exe.program, Target.parse("ort-cuda")) is None


here = ort_cuda.PROVIDER in ort.get_available_providers() and driver.available() and toolchain.nvcc() is not None
gpu = pytest.mark.skipif(not here, reason="no GPU, no nvcc, or an ONNX Runtime without CUDA")


@gpu
@pytest.mark.parametrize("graphs", [0, 1])
@pytest.mark.parametrize("lists", [False, True])
@pytest.mark.parametrize(("size", "length"), [(64, 130), (128, 257), (64, 1)])
def test_attention_on_a_gpu(size, length, lists, graphs):
    model = attention(heads=4, size=size, length=length, lists=lists)
    library = ort_library.library_for([model])
    runner = ort_cuda.compile_ort_cuda(model, Target.parse(f"ort-cuda:kernels,graphs={graphs}"), library=library)
    tables = [v.const_value.numpy() for v in next(iter(model.graph)).inputs[3:]]
    given = {"q_num_heads": 4, "kv_num_heads": 4, "scale": 0.125, "is_causal": 1} | (
        {"block_size": 64} if lists else {}
    )
    for seed in range(2):
        random = np.random.default_rng(seed)
        feeds = {n: random.standard_normal((2, length, 4 * size)).astype(np.float16) for n in "qkv"}
        operator = dialect_op("BlockSparseAttention" if lists else "FlashAttention")
        (want,) = operator.reference(*(a.astype(float) for a in feeds.values()), *tables, **given)
        got = runner.run(feeds)["y"].astype(float)
        assert np.linalg.norm(got - want) / np.linalg.norm(want) < 1e-3


@gpu
def test_batches_of_queries_on_a_gpu():
    """One query a row, of more rows at a time and fewer: what is counted for some is not what others summed."""
    model = attention(heads=4, length=1, lists=False)
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = ir.Shape(["batch", "keys" if value.name in "kv" else 1, 256])
    node = next(iter(model.graph))
    node.attributes["is_causal"] = ir.AttrInt64("is_causal", 0)
    library = ort_library.library_for([model])
    runner = ort_cuda.compile_ort_cuda(model, Target.parse("ort-cuda:kernels,graphs=0"), library=library)
    random = np.random.default_rng(0)
    for batch in (1, 40, 3, 200, 1):
        feeds = {n: random.standard_normal((batch, 1 if n == "q" else 300, 256)).astype(np.float16) for n in "qkv"}
        given = {"q_num_heads": 4, "kv_num_heads": 4, "scale": 0.125, "is_causal": 0}
        (want,) = dialect_op("FlashAttention").reference(*(a.astype(float) for a in feeds.values()), **given)
        got = runner.run(feeds)["y"].astype(float)
        assert np.linalg.norm(got - want) < 1e-3 * np.linalg.norm(want), batch


@gpu
@pytest.mark.parametrize("shape", [(3, 5), (1, 8), (7, 1111), (0, 8)])
def test_swiglu_on_a_gpu(shape):
    text = f"""<ir_version: 10, opset_import: ["" : 23, "planish" : 1]>
    g (float16[{shape[0]}, {shape[1]}] a, float16[{shape[0]}, {shape[1]}] b) => (float16[{shape[0]}, {shape[1]}] y)
    {{ y = planish.SwiGLU(a, b) }}"""
    model = program_of(text).main
    library = ort_library.library_for([model])
    runner = ort_cuda.compile_ort_cuda(model, Target.parse("ort-cuda:kernels,graphs=0"), library=library)
    a, b = (8 * np.random.default_rng(i).standard_normal(shape).astype(np.float16) for i in range(2))
    (want,) = dialect_op("SwiGLU").reference(a.astype(float), b.astype(float))
    got = runner.run({"a": a, "b": b})["y"].astype(float)
    assert np.linalg.norm(got - want) <= 1e-3 * np.linalg.norm(want)
