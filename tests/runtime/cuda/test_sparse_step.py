"""BlockSparseStep as an operator of ONNX Runtime on CUDA: what has a kernel, the library, and on a GPU its results."""

from __future__ import annotations

import ctypes

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

import planish
from planish.ir.block_sparsity import S2
from planish.ir.block_sparsity.pattern import Heads
from planish.ir.ops import import_functions
from planish.ir.ops.block_sparse_step import BLOCK_SPARSE_STEP
from planish.ir.printer import parse_model
from planish.ir.target import Target
from planish.passes.base import PassContext
from planish.passes.precision.float16 import Float16
from planish.passes.sparsity.shard_attention import ShardAttention
from planish.passes.testing import program_of
from planish.runtime import ort_cuda
from planish.runtime.cuda import driver, ort_library, toolchain
from tests.runtime.cuda.test_ort_library import stand_in  # noqa: F401

SETTINGS = {"q_num_heads": 4, "kv_num_heads": 2, "scale": 0.125, "block_size": 64}


def model_of(size: int = 64, dtype: str = "float16", block: int = 64) -> ir.Model:
    kinds = ", ".join(
        [
            f"{dtype}[B, 1, {4 * size}] q", f"{dtype}[B, 1, {2 * size}] k", f"{dtype}[B, 1, {2 * size}] v",
            f"{dtype}[B, 2, C, {size}] pk", f"{dtype}[B, 2, C, {size}] pv", "int32[B] l", "int32[L, R] ip",
            "int32[E] ix", "int32[4] hl",
        ]
    )  # fmt: skip
    model = parse_model(
        f"""<ir_version: 10, opset_import: ["" : 23, "planish" : 1]>
        g ({kinds}) => ({dtype}[B, 1, {4 * size}] y, {dtype}[B, 2, C, {size}] nk, {dtype}[B, 2, C, {size}] nv)
        {{ y, nk, nv = planish.BlockSparseStep <q_num_heads = 4, kv_num_heads = 2, scale = 0.125, block_size = {block}>
        (q, k, v, pk, pv, l, ip, ix, hl) }}"""
    )
    import_functions(model)
    return model


def test_what_has_a_kernel() -> None:
    def has(model: ir.Model) -> bool:
        return ort_library.has_kernel(next(iter(model.graph)))

    assert has(model_of()) and has(model_of(128, block=128))
    assert not has(model_of(32)) and not has(model_of(dtype="float")) and not has(model_of(block=32))


def test_the_library(stand_in) -> None:  # noqa: F811
    library = ort_library.library_for([model_of(), model_of(128)])
    assert library is not None
    raw = library.path.read_bytes()
    assert raw.count(b"FATBIN ") == 3 and raw.count(b"-DBEYOND=1 ") == 2 and b"BlockSparseStep" in raw
    assert hasattr(ctypes.CDLL(str(library.path)), "RegisterCustomOps")


STEP = """<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>
g (float[B, 1, 256] x, float[B, 2, C, 64] past_0_key, float[B, 2, C, 64] past_0_value, int32[B] held, int32[1] total,
   float[256, 256] wq, float[256, 128] wk)
=> (float[B, 1, 256] y, float[B, 2, C, 64] present_0_key, float[B, 2, C, 64] present_0_value) {
  q = MatMul (x, wq)
  k = MatMul (x, wk)
  v = MatMul (x, wk)
  y, present_0_key, present_0_value = com.microsoft.GroupQueryAttention <num_heads = 4, kv_num_heads = 2>
    (q, k, v, past_0_key, past_0_value, held, total)
}"""


@pytest.mark.parametrize("target", ["ort-cuda:kernels", "ort-cpu"])
def test_a_step_of_a_sharded_model(target: str) -> None:
    """On CUDA its lists are the operator's; elsewhere they are a mask."""
    program = program_of(STEP)
    ctx = PassContext(target=Target.parse(target))
    result = ShardAttention(block=64, local=1, stride=2, max_length=256).apply(program, ctx)
    assert result.fired == 1, result.declined
    kinds = [node.op_type for node in program.main.graph]
    assert ("BlockSparseStep" in kinds) == (target == "ort-cuda:kernels")
    if target == "ort-cuda:kernels":
        Float16().apply(program, ctx)
        node = next(n for n in program.main.graph if n.op_type == "BlockSparseStep")
        assert ort_library.has_kernel(node)
        assert {v.name: v.dtype for v in program.main.graph.inputs}["past_0_key"] == ir.DataType.FLOAT16
        assert {v.name: v.dtype for v in program.main.graph.outputs}["present_0_key"] == ir.DataType.FLOAT16


here = ort_cuda.PROVIDER in ort.get_available_providers() and driver.available() and toolchain.nvcc() is not None
gpu = pytest.mark.skipif(not here, reason="no GPU, no nvcc, or an ONNX Runtime without CUDA")


@gpu
@pytest.mark.parametrize("size", [64, 128])
def test_on_a_gpu(size: int) -> None:
    model = model_of(size)
    library = ort_library.library_for([model])
    runner = ort_cuda.compile_ort_cuda(model, Target.parse("ort-cuda:kernels,graphs=0"), library=library)
    layout = S2(block=64, local=2, stride=2).layout(1024, Heads(4, 2))
    for capacity, lengths in (
        (1, [0]),
        (64, [63, 0]),
        (1000, [999, 130, 512]),
        (1500, [1024, 1023, 1400]),
        (3000, [2999]),
        (1000, [*range(100, 900, 50)]),
    ):
        random, batch = np.random.default_rng(capacity), len(lengths)
        floats = [random.standard_normal((batch, 1, n * size)) for n in (4, 2, 2)]
        floats += [random.standard_normal((batch, 2, capacity, size)) for _ in "kv"]
        rest = [np.array(lengths, np.int32), layout.indptr, layout.indices, layout.head_layout]
        halves = [x.astype(np.float16) for x in floats]
        found = runner.run(dict(zip(["q", "k", "v", "pk", "pv", "l", "ip", "ix", "hl"], [*halves, *rest], strict=True)))
        want = BLOCK_SPARSE_STEP.reference(*(x.astype(float) for x in halves), *rest, **SETTINGS)
        y = found["y"].astype(float)
        assert np.linalg.norm(y - want[0]) < 1e-3 * np.linalg.norm(want[0]), (capacity, lengths)
        assert (found["nk"] == want[1]).all() and (found["nv"] == want[2]).all()


@gpu
def test_generation_on_a_gpu() -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=256, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    module = transformers.LlamaForCausalLM(config).eval()
    settings = {
        "task": "causal-lm", "approximate": "shard-attention{block=64,local=1,stride=2}",
        "budget": planish.Budget(gates=False),
    }  # fmt: skip
    ours = planish.optimize(module, "ort-cuda:kernels,dtype=float16", **settings)
    assert any(n.op_type == "BlockSparseStep" for n in ours.program.entry("decode").graph)
    want = planish.optimize(module, "ort-cpu", **settings)
    prompt = np.random.default_rng(0).integers(0, 96, (1, 200))
    tokens = [exe.generate(prompt, max_new_tokens=20) for exe in (ours, want)]
    assert (np.asarray(tokens[0]) == np.asarray(tokens[1])).mean() > 0.97
