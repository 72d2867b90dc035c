"""Merging between a sum and a norm, and attention with a number for each key: bodies against float64 references."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from planish.ir.ops import DIALECT, InferenceError, TensorInfo, dialect_op, import_functions
from planish.ir.verify import verify_model

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
KINDS = {"sizes": FLOAT, "key_bias": FLOAT, "key_shift": FLOAT}


def symbolic(name: str, array: np.ndarray) -> tuple[int | str, ...]:
    """Batch and tokens are known when the model runs."""
    keys = "N" if name in ("k", "v", "key_bias") else "T"
    return array.shape if array.ndim == 1 else ("B", keys, *array.shape[2:])


def run(op: str, arrays: dict[str, np.ndarray], attributes: dict[str, Any]) -> list[np.ndarray]:
    """The body on ONNX Runtime."""
    inputs = [
        ir.Value(name=n, type=ir.TensorType(ir.DataType.from_numpy(a.dtype)), shape=ir.Shape(symbolic(n, a)))
        for n, a in arrays.items()
    ]
    outputs = [ir.Value(name=o.name) for o in dialect_op(op).schema.outputs]
    node = ir.node(op, inputs, attributes, domain="planish", name="node", outputs=outputs)
    for value, info in zip(outputs, dialect_op(op).infer_node(node), strict=True):
        value.type, value.shape = ir.TensorType(info.dtype), ir.Shape(info.dims)
    graph = ir.Graph(inputs, outputs, nodes=[node], opset_imports={"": 23, "planish": 1}, name="g")
    model = ir.Model(graph, ir_version=10)
    import_functions(model)
    verify_model(model)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, ["CPUExecutionProvider"])
    return [np.asarray(item) for item in session.run(None, arrays)]


def merge_inputs(kind: str, seed: int, batch: int, tokens: int, heads: int, size: int, width: int, extra: int):
    random = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(kind)

    return {
        "x": normal(batch, tokens, width),
        "added": normal(batch, tokens, width),
        "added_shift": normal(width),
        "keys": normal(batch, tokens, 2 * extra + heads * size),
        "key_shift": normal(size).astype("f4"),
        "sizes": random.integers(1, 5, (batch, tokens)).astype("f4"),
        "gain": normal(width),
        "shift": normal(width),
    }


@pytest.mark.parametrize("op", ["AddMergeTokensNorm", "AddMergeTokensEnergyNorm"])
@pytest.mark.parametrize(("kind", "limit"), [("f4", 1e-6), ("f2", 2e-3)])
@pytest.mark.parametrize("shape", [(2, 40, 3, 8, 24, 24), (1, 13, 1, 5, 7, 3), (2, 1, 2, 4, 6, 0), (1, 2, 2, 4, 6, 0)])
def test_merging_between_sum_and_norm(op, kind, limit, shape) -> None:
    arrays = merge_inputs(kind, 1, *shape)
    attributes = {"r": 6, "protected": 1, "heads": shape[2], "size": shape[3], "first": shape[5], "epsilon": 1e-6}
    if "Energy" in op:
        attributes |= {"margin": 0.3, "alpha": 0.9}
    want = dialect_op(op).reference(*arrays.values(), **attributes)
    got = run(op, arrays, attributes)
    np.testing.assert_array_equal(got[4], want[4])
    for found, expected in zip(got[:4], want[:4], strict=True):
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=10 * limit, atol=10 * limit)
    assert [item.dtype.str[1:] for item in got] == [kind, kind, "f4", "f4", "i8"]


def test_merging_between_sum_and_norm_is_the_parts_together() -> None:
    arrays = merge_inputs("f4", 2, 2, 21, 2, 8, 12, 8)
    attributes = {"r": 5, "protected": 1, "heads": 2}
    fused = DIALECT["AddMergeTokensNorm"].reference(*arrays.values(), **attributes, size=8, first=8)
    keys = arrays["keys"][:, :, 8:24].astype("f8").reshape(2, 21, 2, 8) + arrays["key_shift"]
    total = arrays["x"].astype("f8") + arrays["added"] + arrays["added_shift"]
    parts = DIALECT["MergeTokens"].reference(total, keys.reshape(2, 21, 16), arrays["sizes"], **attributes)
    np.testing.assert_allclose(fused[0], parts[0], rtol=1e-12)
    np.testing.assert_array_equal(fused[4], parts[2])
    np.testing.assert_allclose(np.exp(fused[3]), fused[2])
    normal = (fused[1] - arrays["shift"]) / arrays["gain"]
    np.testing.assert_allclose(normal.mean(-1), 0, atol=1e-12)
    np.testing.assert_allclose(np.square(normal).mean(-1), 1, rtol=1e-3)


def attention_inputs(op: str, kind: str, batch: int, tokens: int, heads: int, size: int) -> dict[str, np.ndarray]:
    random, width = np.random.default_rng(3), heads * size
    if op == "FlashAttentionKeyBias":
        shapes = {"q": (batch, tokens, width), "k": (batch, tokens + 3, width), "v": (batch, tokens + 3, width)}
    else:
        shapes = {"qkv": (batch, tokens, 3 * width), "shift": (3 * width,)}
    arrays = {name: random.standard_normal(shape).astype(kind) for name, shape in shapes.items()}
    keys = tokens + 3 * (op == "FlashAttentionKeyBias")
    return arrays | ({"key_bias": random.standard_normal((batch, keys)).astype("f4")} if "Bias" in op else {})


@pytest.mark.parametrize("op", ["PackedAttention", "PackedAttentionKeyBias", "FlashAttentionKeyBias"])
@pytest.mark.parametrize(("kind", "limit"), [("f4", 1e-5), ("f2", 5e-3)])
@pytest.mark.parametrize("shape", [(2, 9, 3, 4), (1, 1, 1, 8)])
def test_attention(op, kind, limit, shape) -> None:
    arrays = attention_inputs(op, kind, *shape)
    heads = {"q_num_heads": shape[2], "kv_num_heads": shape[2]} if "q" in arrays else {"num_heads": shape[2]}
    (want,) = dialect_op(op).reference(*arrays.values(), **heads, scale=0.4)
    (got,) = run(op, arrays, {**heads, "scale": 0.4})
    assert got.dtype.str[1:] == kind and got.shape == want.shape
    assert np.linalg.norm(got - want) <= limit * np.linalg.norm(want)


def test_the_bias_of_keys_alone_changes_nothing() -> None:
    arrays = attention_inputs("PackedAttention", "f8", 2, 7, 2, 4)
    without = dict(arrays, shift=arrays["shift"] * ([1] * 8 + [0] * 8 + [1] * 8))
    reference = DIALECT["PackedAttention"].reference
    (one,), (two,) = (reference(*items.values(), num_heads=2, scale=0.3) for items in (arrays, without))
    np.testing.assert_allclose(one, two, rtol=1e-10)


def test_what_does_not_fit() -> None:
    half, single = (lambda *dims: TensorInfo(HALF, dims)), (lambda *dims: TensorInfo(FLOAT, dims))
    packed = DIALECT["PackedAttentionKeyBias"]
    given = [half(2, 9, 24), half(24), single(2, 9)]
    (y,) = packed.infer(given, {"num_heads": 2, "scale": 1.0})
    assert y == TensorInfo(HALF, (2, 9, 8))
    for at, wrong in ((0, half(2, 9, 20)), (1, half(8)), (2, single(2, 8)), (2, single(2, 9, 1)), (0, half(9, 24))):
        with pytest.raises(InferenceError):
            packed.infer([wrong if i == at else item for i, item in enumerate(given)], {"num_heads": 2, "scale": 1.0})
    merge = DIALECT["AddMergeTokensNorm"]
    given = [half(2, 9, 8), half(2, 9, 8), half(8), half(2, 9, 24), single(4), single(2, 9), half(8), half(8)]
    attributes = {"r": 2, "ratio": 0.0, "protected": 1, "heads": 2, "size": 4, "first": 8, "epsilon": 1e-5}
    made = merge.infer(given, attributes)
    assert [item.dims for item in made] == [(2, 7, 8), (2, 7, 8), (2, 7), (2, 7), (2, 9)]
    assert [item.dtype for item in made[:3]] == [HALF, HALF, FLOAT]
    for at, wrong in ((1, half(2, 9, 7)), (2, half(7)), (3, half(2, 9, 15)), (4, single(5)), (7, half(8, 1))):
        with pytest.raises(InferenceError):
            merge.infer([wrong if i == at else item for i, item in enumerate(given)], attributes)
