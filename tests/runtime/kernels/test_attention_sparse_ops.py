"""Block-sparse and window attention inside ONNX Runtime: operator, function body and float64 reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from planish.ir.ops.block_sparse_attention import BLOCK_SPARSE
from planish.ir.ops.window_attention import WINDOW_ATTENTION
from planish.ir.target import Target
from planish.runtime.ort import compile_ort

pytest.importorskip("tvm")

LOWEST, LOW, BLOCK = float(np.finfo(np.float32).min), -3.3e38, 16
HEADS = {"q_num_heads": 4, "kv_num_heads": 2, "scale": 0.3}
TYPES = {
    "q": "float[b, s, 32]",
    "k": "float[b, t, 16]",
    "v": "float[b, t, 16]",
    "key_mask": "bool[m, 1, 1, n]",
    "indptr": "int32[l, r]",
    "indices": "int32[e]",
    "head_layout": "int32[h]",
    "entry_tile": "int32[f]",
    "tiles": "bool[x, y_, z]",
}
OPS = {**BLOCK_SPARSE, **WINDOW_ATTENTION}
WINDOWS: list[dict[str, Any]] = [
    {"left": 20, "is_causal": 1},
    {"left": 9, "right": 30, "global_keys": 3, "global_queries": 2},
    {"left": 0, "right": 0},
    {"right": 4},
]
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {"block_size": BLOCK, "is_causal": causal}) for name in BLOCK_SPARSE for causal in (0, 1)),
    *((name, window) for name in WINDOW_ATTENTION for window in WINDOWS),
]


def model(name: str, attributes: dict[str, Any]) -> ir.Model:
    names = [operand.name for operand in OPS[name].schema.inputs]
    given = ", ".join(f"{key} = {value!r}" for key, value in (HEADS | attributes).items())
    outputs = [operand.name for operand in OPS[name].schema.outputs]
    types = {"y": "float[b, s, 32]", "lse": "float[b, 4, s]"}
    return ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 23, "planish" : 1]>
        g ({", ".join(f"{TYPES[n]} {n}" for n in names)}) => ({", ".join(f"{types[n]} {n}" for n in outputs)})
        {{ {", ".join(outputs)} = planish.{name} <{given}> ({", ".join(names)}) }}"""
    )


def feeds(name: str, batch: int, queries: int, keys: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(keys * 7 + queries)
    rows = max(1, -(-max(keys, queries) // BLOCK))
    chosen = [np.flatnonzero(rng.random(rows) < 0.6) for _ in range(2 * rows)]
    ends = np.cumsum([0, *map(len, chosen)])
    found = {
        "q": rng.standard_normal((batch, queries, 32), np.float32),
        "k": rng.standard_normal((batch, keys, 16), np.float32),
        "v": rng.standard_normal((batch, keys, 16), np.float32),
        "key_mask": np.arange(keys) >= rng.integers(0, keys + 1, (batch, 1, 1, 1)),
        "indptr": np.stack([ends[: rows + 1], ends[rows:]]).astype(np.int32),
        "indices": np.concatenate([*chosen, np.zeros(0)]).astype(np.int32),
        "head_layout": np.array([0, 1, 1, 0], np.int32),
        "entry_tile": rng.integers(-1, 2, ends[-1]).astype(np.int32),
        "tiles": rng.random((2, BLOCK, BLOCK)) < 0.5,
    }
    return {operand.name: found[operand.name] for operand in OPS[name].schema.inputs}


@pytest.mark.parametrize("name, attributes", CASES)
def test_operator_body_and_reference_agree(name: str, attributes: dict[str, Any]) -> None:
    for hidden in (LOWEST, LOW) if "KeyMask" in name else (None,):
        given = attributes if hidden is None else {**attributes, "hidden_score": hidden}
        runners = [compile_ort(model(name, given), Target.parse(t)) for t in ("ort-cpu", "ort-cpu:kernels")]
        assert [runner.library is not None for runner in runners] == [False, True]
        for batch, queries, keys in ((1, 1, 1), (2, 19, 19), (3, 3, 40), (2, 70, 150), (1, 0, 4)):
            arrays = feeds(name, batch, queries, keys)
            want = OPS[name].reference(*arrays.values(), **HEADS, **given)
            for runner in runners:
                got = runner.run(arrays)
                for operand, expected in zip(OPS[name].schema.outputs, want, strict=True):
                    np.testing.assert_allclose(got[operand.name], expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("BlockSparseAttentionTiles", {"entry_tile": (1,)}, "entry_tile must have shape"),
        ("BlockSparseAttentionTiles", {"tiles": (2, 8, 16)}, "tiles must have shape \\(number, 16, 16\\)"),
        ("BlockSparseAttentionTiles", {"tiles": (0, 16, 16)}, "entry_tile names tile . of 0"),
        ("BlockSparseAttentionKeyMask", {"key_mask": (2, 1, 1, 7)}, "axis 3 of 4 of the mask has size 7"),
        ("WindowAttention", {"q": (2, 60, 32)}, "there are 60 queries and 40 keys"),
    ],
)
def test_wrong_shapes_are_errors(name: str, changed: dict[str, tuple[int, ...]], message: str) -> None:
    attributes = {"left": 3} if name == "WindowAttention" else {"block_size": BLOCK}
    given = feeds(name, 2, 40, 40)
    for key, shape in changed.items():
        given[key] = np.ones(shape, given[key].dtype)
    made = model(name, attributes)
    for value in made.graph.inputs:
        value.shape = None
    made.graph.inputs[0].shape = ir.Shape([None, None, 32])
    with pytest.raises(Exception, match=message):
        compile_ort(made, Target.parse("ort-cpu:kernels")).run(given)


def test_windows_that_can_not_be() -> None:
    from planish.ir.ops import InferenceError, TensorInfo

    q = TensorInfo(ir.DataType.FLOAT, (1, 5, 32))
    k = TensorInfo(ir.DataType.FLOAT, (1, 4, 16))
    window = {"left": -1, "right": -1, "global_keys": 0, "global_queries": 0, "is_causal": 0, **HEADS}
    op = WINDOW_ATTENTION["WindowAttention"]
    with pytest.raises(InferenceError, match="there are 5 queries and 4 keys"):
        op.infer([q, k, k], window)
    with pytest.raises(InferenceError, match="left is -2; it must be -1 or more"):
        op.infer([k, k, k], {**window, "left": -2})


def test_cost_of_a_window_is_by_its_pairs() -> None:
    from planish.ir.ops.window_attention import window_mask, window_pairs

    for queries, keys in ((1, 1), (7, 7), (3, 20), (20, 20)):
        for window in WINDOWS:
            full = {"left": -1, "right": -1, "global_keys": 0, "global_queries": 0, "is_causal": 0, **window}
            assert window_pairs(queries, keys, full) == window_mask(queries, keys, **full).sum()
