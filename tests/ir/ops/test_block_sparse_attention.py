"""planish::BlockSparseAttention: body on ONNX Runtime against the float64 reference, inference, cost, pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from planish.ir.ops import DIALECT, InferenceError, TensorInfo, import_functions
from planish.ir.ops.block_sparse_attention import layout_mask, layout_picture
from planish.ir.printer import parse_model
from planish.ir.verify import verify_model

OP = DIALECT["BlockSparseAttention"]
FLOAT, INT = ir.DataType.FLOAT, ir.DataType.INT32
HEADS = {"q_num_heads": 4, "kv_num_heads": 2, "scale": 0.4}


def model_of(attributes: dict[str, Any]) -> ir.Model:
    given = ", ".join(f"{key} = {value}" for key, value in attributes.items())
    model = parse_model(
        f"""
        <ir_version: 10, opset_import: ["" : 23, "planish" : 1]>
        g (float[B, S, N] q, float[B, T, M] k, float[B, T, M] v, int32[L, R] p, int32[E] i, int32[H] h)
          => (float[B, S, N] y) {{ y = planish.BlockSparseAttention <{given}> (q, k, v, p, i, h) }}
        """
    )
    import_functions(model)
    return model


def lists(rng: np.random.Generator, layouts: int, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Random lists in random order, some of them empty."""
    chosen = [rng.permutation(np.flatnonzero(rng.random(columns) < 0.5)) for _ in range(layouts * rows)]
    ends = np.concatenate([[0], np.cumsum([len(one) for one in chosen])]).astype(np.int32)
    indptr = np.stack([ends[n * rows : (n + 1) * rows + 1] for n in range(layouts)])
    return indptr, np.concatenate([*chosen, np.zeros(0)]).astype(np.int32)


def arrays(seed: int, batch: int, queries: int, keys: int, block: int, rows: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = ((queries, 4), (keys, 2), (keys, 2))
    qkv = [rng.standard_normal((batch, n, heads * 8), np.float32) for n, heads in shapes]
    return [*qkv, *lists(rng, 3, rows, -(-keys // block)), np.array([0, 2, 1, 2], np.int32)]


def check(given: list[np.ndarray], **attributes: int) -> None:
    model = model_of({**HEADS, **attributes})
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]
    (got,) = session.run(None, dict(zip(names, given, strict=True)))
    (want,) = OP.reference(*given, **HEADS, **attributes)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("queries, keys", [(1, 1), (8, 8), (13, 13), (9, 22), (22, 9)])
def test_body(queries: int, keys: int) -> None:
    for seed in range(3):
        check(arrays(seed, 2, queries, keys, 4, -(-queries // 4)), block_size=4, is_causal=0)


@pytest.mark.parametrize("queries, keys", [(1, 1), (1, 17), (13, 13), (6, 21)])
def test_causal_body(queries: int, keys: int) -> None:
    """The queries are at the end of the keys, and rows of the layout are those of positions."""
    for seed in range(3):
        check(arrays(seed, 2, queries, keys, 4, -(-keys // 4)), block_size=4, is_causal=1)


def test_positions_without_a_row_give_zeros() -> None:
    given = arrays(0, 1, 12, 12, 4, 2)
    check(given, block_size=4)
    (y,) = OP.reference(*given, **HEADS, block_size=4)
    assert not y[:, 8:].any() and y[:, :8].any()


def test_lists_may_be_shared_and_name_blocks_that_are_not_there() -> None:
    given = arrays(0, 1, 8, 8, 4, 2)
    given[3:5] = [np.array([[0, 2, 4], [2, 4, 4], [0, 0, 2]], np.int32), np.array([0, 7, -1, 1], np.int32)]
    check(given, block_size=4)


def test_a_full_layout_is_dense_attention() -> None:
    q, k, v, *_ = arrays(3, 2, 10, 10, 4, 3)
    indptr, indices = np.array([[0, 3, 6, 9]], np.int32), np.tile(np.arange(3, dtype=np.int32), 3)
    layout = np.zeros(4, np.int32)
    for is_causal in (0, 1):
        (want,) = DIALECT["FlashAttention"].reference(q, k, v, **HEADS, is_causal=is_causal)
        (got,) = OP.reference(q, k, v, indptr, indices, layout, **HEADS, block_size=4, is_causal=is_causal)
        np.testing.assert_allclose(got, want, rtol=1e-12)


def test_function_is_valid() -> None:
    verify_model(model_of({**HEADS, "block_size": 16, "is_causal": 1}), full=True)


def test_layout_mask() -> None:
    mask = layout_mask(np.array([[0, 1, 3]]), np.array([1, 0, 1]), 2, 3, 3)
    np.testing.assert_array_equal(mask[0].astype(int), [[0, 0, 1], [0, 0, 1], [1, 1, 1]])
    # With an offset of 2 the first query is in the second row.
    np.testing.assert_array_equal(layout_mask(np.array([[0, 1, 3]]), np.array([1, 0, 1]), 2, 1, 3, 2)[0], [[1, 1, 1]])


def test_picture() -> None:
    indptr, indices = np.array([[0, 1, 3, 5], [5, 5, 6, 7]]), np.array([0, 0, 1, 0, 2, 0, 1])
    assert layout_picture(indptr[0], indices) == "#..\n##.\n#.#"
    assert layout_picture(indptr, indices, 4, is_causal=True) == "#\n##\n#.#\n\n.\n#.\n.#."


def infer(**changed: Any) -> Any:
    shapes = {"q": (1, "S", 32), "k": (1, "S", 16), "v": (1, "S", 16), "indptr": ("L", 5), "indices": ("E",), "h": (4,)}
    attributes = {**HEADS, "block_size": changed.pop("block_size", 64), "is_causal": 0}
    infos = [TensorInfo(INT if n in ("indptr", "indices", "h") else FLOAT, s) for n, s in (shapes | changed).items()]
    return OP.infer(infos, attributes)


def test_inference() -> None:
    assert infer() == [TensorInfo(FLOAT, (1, "S", 32))]
    for changed, message in (
        ({"h": (3,)}, "head_layout and q_num_heads: sizes 3 and 4"),
        ({"indptr": (5,)}, "indptr has rank 1"),
        ({"indptr": (2, 1)}, "indptr has 1 columns"),
        ({"indices": (2, 8)}, "indices has rank 2"),
        ({"block_size": 0}, "block_size is 0"),
    ):
        with pytest.raises(InferenceError, match=message):
            infer(**changed)


def test_cost_is_by_the_blocks_that_are_listed() -> None:
    q, k = TensorInfo(FLOAT, (1, 128, 32)), TensorInfo(FLOAT, (1, 128, 16))

    def flops(entries: int) -> int:
        lists = (TensorInfo(INT, (2, 9)), TensorInfo(INT, (entries,)), TensorInfo(INT, (4,)))
        return OP.cost([q, k, k, *lists], [q], {**HEADS, "block_size": 16, "is_causal": 0}).flops

    dense = 128 * 128 * (4 * 32 + 5 * 4)
    assert flops(2 * 64) == dense
    assert flops(2 * 16) == dense // 4
    assert flops(1000) == dense
