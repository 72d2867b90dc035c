"""Attention inside ONNX Runtime: operator, function body and float64 reference against each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from planish.ir.errors import UnsupportedError
from planish.ir.ops import DIALECT, import_functions
from planish.ir.printer import parse_model
from planish.runtime.kernels.attention_ops import AttentionKernel
from planish.runtime.kernels.library import Library, library_for

pytest.importorskip("tvm")

SIZE, Q_HEADS, KV_HEADS = 16, 4, 2
HEADS = {"q_num_heads": Q_HEADS, "kv_num_heads": KV_HEADS, "scale": 0.31}
MORE = {
    "FlashAttention": "",
    "FlashAttentionPast": "",
    "FlashAttentionBias": ", float[W, X, Y, Z] m",
    "FlashAttentionMask": ", bool[W, X, Y, Z] m",
    "BlockSparseAttention": ", int32[L, R] p, int32[E] i, int32[H] h",
}
#: Operator → attributes besides those of heads.
CASES: list[tuple[str, dict[str, int]]] = [
    ("FlashAttention", {"is_causal": 0}),
    ("FlashAttention", {"is_causal": 1}),
    ("FlashAttentionPast", {}),
    ("FlashAttentionBias", {"is_causal": 0}),
    ("FlashAttentionMask", {"is_causal": 0}),
    ("BlockSparseAttention", {"block_size": 16, "is_causal": 1}),
]


def model_of(name: str, attributes: dict[str, Any], width: int | str = SIZE * Q_HEADS) -> ir.Model:
    given = ", ".join(f"{key} = {value}" for key, value in (HEADS | attributes).items())
    names = ", ".join("qkv" + "".join(item[-1] for item in MORE[name].split(", ") if "] " in item))
    model = parse_model(
        f"""
        <ir_version: 10, opset_import: ["" : 23, "planish" : 1]>
        g (float[B, S, {width}] q, float[B, T, {SIZE * KV_HEADS}] k, float[B, T, {SIZE * KV_HEADS}] v{MORE[name]})
          => (float[B, S, {width}] y) {{ y = planish.{name} <{given}> ({names}) }}
        """
    )
    import_functions(model)
    return model


@pytest.fixture(scope="module")
def library() -> Library:
    try:
        found = library_for([model_of(*case) for case in CASES])
    except UnsupportedError as error:
        pytest.skip(str(error))
    assert found is not None and [kernel.op for kernel in found.kernels] == sorted(MORE)
    return found


def run(model: ir.Model, arrays: list[np.ndarray], library: Library | None, threads: int = 1) -> np.ndarray:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    if library is not None:
        options.register_custom_ops_library(str(library.path))
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]
    return np.asarray(session.run(None, dict(zip(names, arrays, strict=True)))[0])


def arrays(name: str, batch: int, queries: int, keys: int) -> list[np.ndarray]:
    rng = np.random.default_rng(keys)
    shapes = ((queries, Q_HEADS), (keys, KV_HEADS), (keys, KV_HEADS))
    qkv = [rng.standard_normal((batch, n, heads * SIZE), np.float32) for n, heads in shapes]
    seen = rng.random((batch, 1, queries, keys)) < 0.7
    if name == "FlashAttentionMask":
        return [*qkv, seen]
    if name == "FlashAttentionBias":
        return [*qkv, np.where(seen, rng.standard_normal(seen.shape), -np.inf).astype(np.float32)]
    if name == "BlockSparseAttention":
        rows = -(-keys // 16)
        lists = [np.flatnonzero(rng.random(rows) < 0.6) for _ in range(2 * rows)]
        ends = np.cumsum([0, *map(len, lists)])
        indptr = np.stack([ends[: rows + 1], ends[rows:]]).astype(np.int32)
        indices = np.concatenate([*lists, np.zeros(0)]).astype(np.int32)
        return [*qkv, indptr, indices, np.array([0, 1, 1, 0], np.int32)]
    return qkv


@pytest.mark.parametrize("name, attributes", CASES)
def test_operator_body_and_reference_agree(name: str, attributes: dict[str, int], library: Library) -> None:
    model = model_of(name, attributes)
    for batch, queries, keys in ((1, 1, 1), (2, 19, 19), (1, 3, 40), (2, 70, 150)):
        given = arrays(name, batch, queries, keys)
        (want,) = DIALECT[name].reference(*given, **HEADS, **attributes)
        kernel = run(model, given, library)
        np.testing.assert_allclose(kernel, want, rtol=1e-5, atol=2e-6)
        np.testing.assert_allclose(run(model, given, None), want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("shape", [(70, 90), (1, 90), (2, 1, 1, 90), (1, 4, 1, 1)])
def test_masks_are_broadcast(shape: tuple[int, ...], library: Library) -> None:
    given = arrays("FlashAttentionBias", 2, 70, 90)
    given[3] = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    model = model_of("FlashAttentionBias", {})
    model.graph.inputs[3].shape = ir.Shape([None] * len(shape))
    (want,) = DIALECT["FlashAttentionBias"].reference(*given, **HEADS)
    np.testing.assert_allclose(run(model, given, library), want, rtol=1e-5, atol=2e-6)


def test_the_kernel_runs_and_not_the_body(library: Library) -> None:
    """A body could not refuse, with this message, what the kernel refuses."""
    given = arrays("FlashAttention", 1, 5, 5)
    model = model_of("FlashAttention", {"is_causal": 0})
    for value in model.graph.inputs:
        value.shape = ir.Shape([None] * 3)
    given[2] = given[2][:, :4]
    with pytest.raises(Exception, match="FlashAttention: k and v must have the same shape"):
        run(model, given, library)


def test_tasks_on_several_threads(library: Library) -> None:
    for name, attributes in CASES:
        given = arrays(name, 2, 100, 100)
        one, two = (run(model_of(name, attributes), given, library, threads) for threads in (1, 2))
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("FlashAttentionPast", {0: (1, 9, 64)}, "there are 9 queries and 5 keys"),
        ("FlashAttentionMask", {3: (1, 1, 4, 5)}, "axis 2 of 4 of the mask has size 4; it must be 1 or 5"),
        ("FlashAttention", {0: (2, 5, 64)}, "q has batch 2, k and v 1"),
        ("FlashAttention", {0: (1, 5, 128)}, "do not divide the last axes"),
        ("BlockSparseAttention", {5: (3,)}, "head_layout must have shape \\(4\\)"),
        ("BlockSparseAttention", {3: (2, 1)}, "indptr must have shape"),
    ],
)
def test_wrong_shapes_are_errors(
    name: str, changed: dict[int, tuple[int, ...]], message: str, library: Library
) -> None:
    attributes = next(attributes for case, attributes in CASES if case == name)
    model, given = model_of(name, attributes), arrays(name, 1, 5, 5)
    for index, shape in changed.items():
        given[index] = np.zeros(shape, given[index].dtype)
    for value in model.graph.inputs:
        value.shape = ir.Shape([None] * len(value.shape or ()))
    with pytest.raises(Exception, match=message):
        run(model, given, library)


def test_no_kernel_where_the_head_size_is_unknown() -> None:
    known, unknown = (next(iter(model_of("FlashAttention", {}, width).graph)) for width in (64, "N"))
    assert AttentionKernel.of("FlashAttention", [known]) == AttentionKernel("FlashAttention", ((16, False, 0),))
    assert AttentionKernel.of("FlashAttention", [known, unknown]) is None
    small = next(iter(model_of("BlockSparseAttention", {"block_size": 8}).graph))
    assert AttentionKernel.of("BlockSparseAttention", [small]) is None
