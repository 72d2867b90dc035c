"""Operators of the dialect on tvm-cuda: compiled with our kernels inside, and against float64 where there is a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from planish.ir.ops.block_sparse_attention import layout_mask
from planish.ir.ops.merge_reference import reference
from planish.ir.target import Target
from planish.runtime.cuda import driver, toolchain
from planish.runtime.tvm_cuda import compile_tvm_cuda

pytest.importorskip("tvm")
pytestmark = pytest.mark.skipif(toolchain.nvcc() is None, reason="no nvcc")
gpu = pytest.mark.skipif(not driver.available(), reason="no GPU")
FLOATS = {"float16": ir.DataType.FLOAT16, "float32": ir.DataType.FLOAT}
INDPTR = np.array([[0, 1, 3, 5, 8], [0, 1, 2, 4, 6]], np.int32)
INDICES = np.array([0, 0, 1, 1, 2, 0, 2, 3, 0, 1, 0, 2, 1, 3], np.int32)
LAYOUT = np.array([0, 1, 0, 1], np.int32)


def here() -> Target:
    """The GPU at hand, which is quicker to compile for than all."""
    return Target.parse(f"tvm-cuda:sm_{driver.device().arch}")


def value(name: str, dims: Any, dtype: ir.DataType, array: np.ndarray | None = None) -> ir.Value:
    constant = None if array is None else ir.tensor(array, name=name)
    return ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(dtype), const_value=constant)


def constant(name: str, array: np.ndarray) -> ir.Value:
    return value(name, array.shape, ir.DataType.from_numpy(array.dtype), array)


def one(op: str, domain: str, inputs: list[ir.Value | None], outputs: list[ir.Value], **attributes: Any) -> ir.Model:
    """A model of one node."""
    kinds = {int: ir.AttributeType.INT, float: ir.AttributeType.FLOAT}
    given = [ir.Attr(name, kinds[type(item)], item) for name, item in attributes.items()]
    node = ir.Node(domain, op, inputs, given, outputs=outputs, name="node")
    graph = ir.Graph(
        [v for v in inputs if v is not None and v.const_value is None], outputs, nodes=[node],
        initializers=[v for v in inputs if v is not None and v.const_value is not None],
        opset_imports={"": 23, domain: 1}, name="g",
    )  # fmt: skip
    return ir.Model(graph, ir_version=10)


def sparse(dtype: str, size: int, block: int) -> ir.Model:
    kind = FLOATS[dtype]
    inputs = [value("q", ["b", "s", 4 * size], kind)]
    inputs += [value(name, ["b", "t", 2 * size], kind) for name in "kv"]
    inputs += [constant("indptr", INDPTR), constant("indices", INDICES), constant("layout", LAYOUT)]
    return one(
        "BlockSparseAttention", "planish", inputs, [value("y", ["b", "s", 4 * size], kind)],
        q_num_heads=4, kv_num_heads=2, scale=float(size**-0.5), block_size=block, is_causal=1,
    )  # fmt: skip


def merging(op: str, dtype: str, **attributes: Any) -> ir.Model:
    kind = FLOATS[dtype]
    inputs = [value("x", ["b", 57, 40], kind), value("keys", ["b", 57, 48], kind)]
    inputs.append(value("sizes", ["b", 57], ir.DataType.FLOAT))
    outputs = [value("y", ["b", 47, 40], kind), value("merged", ["b", 47], ir.DataType.FLOAT)]
    outputs.append(value("index", ["b", 57], ir.DataType.INT64))
    return one(op, "planish", inputs, outputs, r=10, protected=1, heads=3, **attributes)


def unpacked(codes: np.ndarray, bits: int) -> np.ndarray:
    return codes if bits == 8 else np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:-1], -1)


def quantized(dtype: str, dims: list[Any], bits: int, block: int, zeros: bool) -> tuple[ir.Model, np.ndarray]:
    """The model, and its weight (N, K) in float64."""
    rng = np.random.default_rng()
    depth, columns = 272, 100
    blocks = -(-depth // block)
    codes = rng.integers(0, 256, (columns, blocks, block * bits // 8)).astype(np.uint8)
    scales = (rng.random((columns, blocks)) + 0.1).astype(dtype)
    numbers = rng.integers(0, 256, (columns, -(-blocks * bits // 8))).astype(np.uint8)
    zero = unpacked(numbers, bits)[:, :blocks].astype(int) if zeros else np.full((columns, blocks), 1 << (bits - 1))
    weight = (unpacked(codes, bits) - zero[..., None]) * scales.astype(np.float64)[..., None]
    inputs = [value("x", [*dims, depth], FLOATS[dtype]), constant("codes", codes), constant("scales", scales.ravel())]
    inputs.append(constant("zeros", numbers.ravel()) if zeros else None)  # type: ignore[arg-type]
    settings = {"K": depth, "N": columns, "bits": bits, "block_size": block}
    made = one("MatMulNBits", "com.microsoft", inputs, [value("y", [*dims, columns], FLOATS[dtype])], **settings)
    return made, weight.reshape(columns, -1)[:, :depth]


def test_kernels_are_in_the_library_where_they_fit() -> None:
    from planish.ir.spec import TensorSpec
    from planish.runtime.relax.cuda.build import build

    def calls(made: ir.Model) -> set[str]:
        return build(made, [TensorSpec.of(v) for v in made.graph.inputs], "sm_80").device.calls

    assert calls(sparse("float16", 64, 64)) == {"planish_block_sparse"}
    assert calls(sparse("float32", 32, 64)) == {"planish_batched"}
    assert calls(merging("MergeTokens", "float16")) == {"planish_merge_tokens"}
    assert calls(quantized("float16", ["b", 1], 4, 32, True)[0]) == {"planish_quantized_gemv"}
    assert calls(quantized("float16", ["b", "s"], 4, 32, True)[0]) == {"planish_batched"}


@gpu
@pytest.mark.parametrize(("dtype", "size", "block"), [("float16", 64, 64), ("float16", 128, 128), ("float32", 24, 48)])
def test_attention_over_lists(dtype: str, size: int, block: int) -> None:
    runner = compile_tvm_cuda(sparse(dtype, size, block), here())
    rng = np.random.default_rng()
    for batch, queries, keys in ((2, 3 * block + 5, 4 * block), (1, 1, 1), (2, 1, 3 * block + 1), (1, block, block)):
        shapes = {"q": (batch, queries, 4 * size), "k": (batch, keys, 2 * size), "v": (batch, keys, 2 * size)}
        given = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
        q, k, v = (
            given[n].astype(np.float64).reshape(*given[n].shape[:2], -1, size).transpose(0, 2, 1, 3) for n in "qkv"
        )
        at = np.arange(queries)[:, None] + keys - queries
        seen = layout_mask(INDPTR, INDICES, block, queries, keys, keys - queries)[LAYOUT] & (np.arange(keys) <= at)
        scores = np.where(seen, q @ np.repeat(k, 2, 1).swapaxes(2, 3) * size**-0.5, -np.inf)
        weights = np.exp(scores - np.maximum(scores.max(-1, keepdims=True), -1e30))
        total = weights.sum(-1, keepdims=True)
        want = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0) @ np.repeat(v, 2, 1)
        tolerance = 4e-3 if dtype == "float16" else 1e-5
        got = runner.run(given)["y"].reshape(batch, queries, 4, size).transpose(0, 2, 1, 3)
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


@gpu
@pytest.mark.parametrize("op", ["MergeTokens", "MergeTokensEnergyMaxNorm"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_merging(op: str, dtype: str) -> None:
    settings: dict[str, Any] = {"margin": 0.4, "alpha": 1.0} if "Energy" in op else {}
    runner = compile_tvm_cuda(merging(op, dtype, **settings), here())
    rng = np.random.default_rng()
    for batch in (1, 9):
        x, keys = (rng.standard_normal((batch, 57, width)).astype(dtype) for width in (40, 48))
        sizes = rng.integers(1, 4, (batch, 57)).astype(np.float32)
        want = reference("Energy" in op, "MaxNorm" in op)(x, keys, sizes, r=10, protected=1, heads=3, **settings)
        got = runner.run({"x": x, "keys": keys, "sizes": sizes})
        np.testing.assert_array_equal(got["index"], want[2])
        np.testing.assert_array_equal(got["merged"], want[1])
        tolerance = 2e-3 if dtype == "float16" else 1e-5
        np.testing.assert_allclose(got["y"], want[0], rtol=tolerance, atol=tolerance)


@gpu
@pytest.mark.parametrize(
    ("dtype", "dims", "bits", "block", "zeros"),
    [
        ("float16", ["b", 1], 4, 32, False),
        ("float16", ["b", 1], 4, 16, True),
        ("float16", ["b", 1], 8, 64, True),
        ("float16", ["b", "s"], 4, 32, True),
        ("float32", ["b", 1], 8, 32, True),
    ],
)
def test_weights_in_few_bits(dtype: str, dims: list[Any], bits: int, block: int, zeros: bool) -> None:
    made, weight = quantized(dtype, dims, bits, block, zeros)
    runner = compile_tvm_cuda(made, here())
    for batch in (1, 2, 3, 8, 21):
        x = np.random.default_rng().standard_normal((batch, 1 if dims[1] == 1 else 5, 272)).astype(dtype)
        want = x.astype(np.float64) @ weight.T
        error = np.linalg.norm(runner.run({"x": x})["y"] - want) / np.linalg.norm(want)
        assert error < (2e-3 if dtype == "float16" else 1e-6)


@gpu
def test_rows_of_a_table_in_four_bits() -> None:
    rng = np.random.default_rng()
    codes = rng.integers(0, 256, (37, 5, 16)).astype(np.uint8)
    scales = rng.random((37, 5, 1)).astype(np.float16)
    inputs = [constant("codes", codes), value("ids", ["b", "s"], ir.DataType.INT64), constant("scales", scales)]
    outputs = [value("y", ["b", "s", 5, 32], ir.DataType.FLOAT16)]
    settings = {"bits": 4, "block_size": 32, "gather_axis": 0, "quantize_axis": 2}
    runner = compile_tvm_cuda(one("GatherBlockQuantized", "com.microsoft", inputs, outputs, **settings), here())
    ids = rng.integers(0, 37, (3, 7))
    want = ((unpacked(codes, 4).astype(int) - 8) * scales.astype(np.float64))[ids]
    np.testing.assert_allclose(runner.run({"ids": ids})["y"], want, rtol=1e-3, atol=1e-3)
