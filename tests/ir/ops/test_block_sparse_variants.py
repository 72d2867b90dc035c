"""The relatives of planish::BlockSparseAttention: body on ONNX Runtime against the float64 reference, and combining."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from planish.ir.ops import DIALECT, InferenceError, TensorInfo, import_functions
from planish.ir.ops.block_sparse_attention import BLOCK_SPARSE, combine, layout_mask
from planish.ir.printer import parse_model
from planish.ir.verify import verify_model

FLOAT, INT, BOOL = ir.DataType.FLOAT, ir.DataType.INT32, ir.DataType.BOOL
HEADS = {"q_num_heads": 4, "kv_num_heads": 2, "scale": 0.4}
LOWEST, LOW = float(np.finfo(np.float32).min), -3.3e38
BLOCK = 4


def model_of(name: str, attributes: dict[str, Any]) -> ir.Model:
    given = ", ".join(f"{key} = {value!r}" for key, value in (HEADS | attributes).items())
    types = {"key_mask": "bool[M, 1, 1, N]", "indptr": "int32[L, R]", "tiles": f"bool[K, {BLOCK}, {BLOCK}]"}
    types |= {"q": "float[B, S, 32]", "k": "float[B, T, 16]", "v": "float[B, T, 16]", "head_layout": "int32[4]"}
    names = [operand.name for operand in BLOCK_SPARSE[name].schema.inputs]
    inputs = ", ".join(f"{types.get(n, 'int32[E]')} {n}" for n in names)
    lse = "Lse" in name
    model = parse_model(
        f"""
        <ir_version: 10, opset_import: ["" : 23, "planish" : 1]>
        g ({inputs}) => (float[B, S, 32] y{", float[B, 4, S] lse" * lse})
        {{ y{", lse" * lse} = planish.{name} <{given}> ({", ".join(names)}) }}
        """
    )
    import_functions(model)
    return model


def arrays(name: str, seed: int, queries: int, keys: int, offset: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    batch, rows, columns = 2, -(-(queries + offset) // BLOCK), max(1, -(-keys // BLOCK))
    found = [rng.standard_normal((batch, n, h * 8), np.float32) for n, h in ((queries, 4), (keys, 2), (keys, 2))]
    if "KeyMask" in name:
        found.append(np.arange(keys) >= rng.integers(0, keys + 1, (batch, 1, 1, 1)))
    chosen = [rng.permutation(np.flatnonzero(rng.random(columns) < 0.6)) for _ in range(3 * rows)]
    ends = np.cumsum([0, *map(len, chosen)])
    indptr = np.stack([ends[n * rows : (n + 1) * rows + 1] for n in range(3)]).astype(np.int32)
    found += [indptr, np.concatenate([*chosen, np.zeros(0)]).astype(np.int32), np.array([0, 2, 1, 2], np.int32)]
    if "Tiles" in name:
        found += [rng.integers(-1, 3, len(found[-2])).astype(np.int32), rng.random((3, BLOCK, BLOCK)) < 0.6]
    return found


@pytest.mark.parametrize("name", BLOCK_SPARSE)
@pytest.mark.parametrize("is_causal", [0, 1])
def test_body(name: str, is_causal: int) -> None:
    for hidden in (LOWEST, LOW) if "KeyMask" in name else (None,):
        attributes = {"block_size": BLOCK, "is_causal": is_causal} | ({"hidden_score": hidden} if hidden else {})
        proto = ir.to_proto(model_of(name, attributes)).SerializeToString()
        session = ort.InferenceSession(proto, providers=["CPUExecutionProvider"])
        for queries, keys in ((1, 1), (8, 8), (13, 13), (3, 18), *([] if is_causal else [(18, 3)])):
            given = arrays(name, queries, queries, keys, keys - queries if is_causal else 0)
            got = session.run(None, dict(zip([i.name for i in session.get_inputs()], given, strict=True)))
            want = BLOCK_SPARSE[name].reference(*given, **HEADS, **attributes)
            for a, b in zip(got, want, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", BLOCK_SPARSE)
def test_function_is_valid(name: str) -> None:
    verify_model(model_of(name, {"block_size": BLOCK, "is_causal": 1}), full=True)


def test_parts_of_the_keys_are_put_together() -> None:
    """Split-KV: two layouts that share the blocks of a third among them."""
    op = BLOCK_SPARSE["BlockSparseAttentionLse"]
    q, k, v, *_ = arrays("BlockSparseAttentionLse", 3, 10, 10, 0)
    layout = np.zeros(4, np.int32)

    def run(*rows: list[int]) -> tuple[np.ndarray, ...]:
        indptr = np.cumsum([0, *map(len, rows)]).astype(np.int32)[None]
        return op.reference(
            q, k, v, indptr, np.array([*itertools.chain(*rows)], np.int32), layout, **HEADS, block_size=BLOCK
        )

    whole = run([0, 1, 2], [0, 1], [])
    parts = [run([0], [], []), run([2, 1], [1, 0], [])]
    y, lse = combine([p[0] for p in parts], [p[1] for p in parts])
    np.testing.assert_allclose(y, whole[0], rtol=1e-12)
    np.testing.assert_allclose(lse, whole[1], rtol=1e-12)
    assert np.isneginf(lse[..., 8:]).all() and not y[:, 8:].any()


def test_tiles_say_what_lists_can_not() -> None:
    """A band of 3 keys, with blocks of 4: the diagonal tile and the one before it."""
    i, j = np.arange(10)[:, None], np.arange(10)
    band = (j <= i) & (j > i - 3)
    a, b = np.arange(4)[None, :], np.arange(4)[:, None]  # a: query, b: key
    tiles = np.stack([(b <= a) & (b > a - 3), b - 4 > a - 3])
    indptr, indices = np.array([[0, 1, 3, 5]]), np.array([0, 0, 1, 1, 2])
    got = layout_mask(indptr, indices, 4, 10, 10, tiles=(np.array([0, 1, 0, 1, 0]), tiles))
    np.testing.assert_array_equal(got[0], band)


def test_inference() -> None:
    q, k = TensorInfo(FLOAT, (1, "S", 32)), TensorInfo(FLOAT, (1, "S", 16))
    lists = {"indptr": (INT, (1, 5)), "indices": (INT, (9,)), "head_layout": (INT, (4,)), "entry_tile": (INT, (9,)),
             "tiles": (BOOL, (2, 16, 16)), "key_mask": (BOOL, (1, 1, 1, "S"))}  # fmt: skip

    def infer(name: str, **changed: tuple[Any, ...]) -> Any:
        op = DIALECT[name]
        infos = [TensorInfo(*lists[o.name][:1], changed.get(o.name, lists[o.name][1])) if o.name in lists else None
                 for o in op.schema.inputs]  # fmt: skip
        infos[:3] = [q, k, k]
        return op.infer(infos, {**HEADS, "block_size": 16, "is_causal": 0})

    assert infer("BlockSparseAttentionLse") == [q, TensorInfo(FLOAT, (1, 4, "S"))]
    assert infer("BlockSparseAttentionTilesKeyMask") == [q]
    with pytest.raises(InferenceError, match="entry_tile and indices: sizes 8 and 9"):
        infer("BlockSparseAttentionTiles", entry_tile=(8,))
    with pytest.raises(InferenceError, match="tiles and block_size: sizes 8 and 16"):
        infer("BlockSparseAttentionTiles", tiles=(2, 16, 8))
    with pytest.raises(InferenceError, match="axis 2 of the key mask has size 3"):
        infer("BlockSparseAttentionKeyMask", key_mask=(1, 1, 3, 7))
